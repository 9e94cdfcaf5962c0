"""The second half of a SAM step: undo the perturbation and let the base optimizer move the weights.

torch.optim.SGD is fused with the undo into one pass; any other optimizer class runs its own step on restored weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.contract import SKIP, Group
from .plan import Scan, Update


class Base(Protocol):
    """What the facade asks of a base optimizer."""

    defaults: dict[str, Any]

    def numbers(self, group: dict[str, Any]) -> Group:
        """A parameter group's hyper-parameters as the primitives take them."""

    def with_momentum(self, groups: Sequence[Group]) -> list[bool]:
        """Which groups' weights have a momentum buffer in a fused update."""

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        """Undo the perturbation and take one step, or only undo it where the status says to skip."""


def make_base(cls: type[Optimizer], optimizer: Optimizer, options: dict[str, Any]) -> Base:
    """The base optimizer `cls(**options)` over the groups and the state of `optimizer`.

    Raises whatever `cls` raises for options that it does not take.
    """
    inner = cls(optimizer.param_groups, **options)
    fused = cls is torch.optim.SGD and not any(g.get("differentiable") for g in inner.param_groups)
    optimizer.param_groups = inner.param_groups
    for p, entry in inner.state.items():  # Adagrad fills its state before the first step
        optimizer.state.setdefault(p, entry)
    return FusedSGD(inner.defaults) if fused else Wrapped(optimizer, inner)


def check_base(cls: Any) -> None:
    """Raise TypeError for anything but an optimizer class that can stand under SAM."""
    if isinstance(cls, Optimizer):
        raise TypeError(
            f"base_optimizer is an instance of {type(cls).__name__}; pass the class, and its options as keywords: "
            f"SAM(params, {type(cls).__name__}, lr=..., ...)"
        )
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer class such as torch.optim.SGD, not {cls!r}")
    clash = [name for name in ("rho", "adaptive", "eta", "perturb") if name in inspect.signature(cls).parameters]
    if clash:
        raise TypeError(
            f"{cls.__name__} has an option {clash[0]!r} of its own, which in SAM's groups is SAM's: "
            "it cannot be SAM's base optimizer"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{cls.__name__}.step needs a closure of its own and cannot be SAM's base optimizer")


def _rate(lr: float | Tensor) -> float | Tensor:
    """A learning rate that lies on an accelerator stays there."""
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


class FusedSGD:
    """torch.optim.SGD, fused with the undo: primitive P3."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        self.defaults = defaults

    def numbers(self, group: dict[str, Any]) -> Group:
        return Group(
            rho=float(group["rho"]),
            adaptive=bool(group["adaptive"]),
            eta=float(group["eta"]),
            lr=_rate(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
        )

    def with_momentum(self, groups: Sequence[Group]) -> list[bool]:
        return [g.momentum != 0 for g in groups]

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        for job in update.restore:
            job.backend.restore(job.table)
        for job in update.jobs:
            job.backend.sgd(job.table, groups, status, grad_scale)


class Wrapped:
    """Any other optimizer class, on the facade's own groups and state."""

    def __init__(self, optimizer: Optimizer, inner: Optimizer) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self.defaults = inner.defaults

    def numbers(self, group: dict[str, Any]) -> Group:
        return Group(float(group["rho"]), bool(group["adaptive"]), float(group["eta"]))

    def with_momentum(self, groups: Sequence[Group]) -> list[bool]:
        return [False for _ in groups]

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        for job in update.perturbed:
            job.backend.restore(job.table)
        if status[SKIP]:
            return
        if grad_scale is not None:
            torch._foreach_div_(scan.present(), grad_scale)
        self._inner.state = self._optimizer.state
        self._inner.param_groups = self._optimizer.param_groups
        step = type(self._inner).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]  # the facade's step runs the hooks
        step(self._inner)
