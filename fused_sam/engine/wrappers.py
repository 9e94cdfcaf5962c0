"""Lightning and Fabric wrap an optimizer in a class of their own, which is also a subclass of the optimizer's class.

Such a wrapper has none of SAM's attributes. It gets properties here that read and set those of the optimizer inside.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def wrapper_class(cls: type) -> type | None:
    """Return the framework's class, if `cls` wraps an optimizer that it keeps as the property `optimizer`."""
    for base in cls.__mro__[1:]:
        if not issubclass(base, Optimizer) and isinstance(vars(base).get("optimizer"), property):
            return base
    return None


def forward_to_wrapped(cls: Any, wrapper: Any, sam: type) -> None:
    """Forward what SAM and its methods add to torch's Optimizer. step() stays the framework's; second_step() calls it.

    Args:
        cls: the class of the wrapped optimizer, a subclass of both others.
        wrapper: the framework's class.
        sam: the class SAM.
    """
    own = {name for base in cls.__mro__ if issubclass(base, sam) and base is not cls for name in vars(base)}
    for name in own:
        if name == "_grad_norm" or not (name.startswith("_") or name in vars(wrapper) or name in vars(Optimizer)):
            setattr(cls, name, _forwarded(name))
    framework_step = wrapper.step

    def step(self: Any, closure: Any = None, **kwargs: Any) -> Any:
        if closure is not None:
            return framework_step(self, closure=closure, **kwargs)
        inner = self.optimizer
        inner.closure_is_empty = True  # Lightning passes one that makes no gradients
        try:
            return framework_step(self, **kwargs)
        finally:
            inner.closure_is_empty = False

    def second_step(self: Any, zero_grad: bool = False) -> None:
        inner = self.optimizer
        if not inner.perturbed:
            inner.second_step()  # raises the error
        self.step()
        if zero_grad:
            inner.zero_grad()

    cls.step, cls.second_step = step, second_step
    cls.zero_grad = _forwarded("zero_grad")


def _forwarded(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.optimizer, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.optimizer, name, value)

    return property(get, put)
