"""The second half of a SAM step: undo the perturbation and let the base optimizer move the parameters.

A base optimizer in FUSED below is fused with the undo into one pass. Any other optimizer class runs its own step on
restored parameters. docs/architecture.md lists what it takes to add a fused base optimizer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam.backends.contract import (
    ADAM,
    LION,
    SGD,
    UPDATED,
    AdamGroup,
    LionGroup,
    SGDGroup,
    Status,
    UpdateRule,
)
from fused_sam.backends.reference import grad_factor
from fused_sam.optimizers import Lion

from .calls import GradSnapshot, UpdatePlan

_VERSION = "_fused_sam_version"  # of a momentum at the last update

Group = dict[str, Any]  # one of an optimizer's param_groups


class Base(Protocol):
    """What SAM asks of a base optimizer."""

    cls: type[Optimizer]
    defaults: dict[str, Any]
    rule: UpdateRule | None  # None if it is not fused

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        """Return for each parameter group its hyper-parameters, and the names of the state that its update uses."""

    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        """Undo the perturbation and take one step, or only undo it if the status says to skip."""


# ---- fused base optimizers, as data ---------------------------------------------------------------------------------


class Fused(NamedTuple):
    """A base optimizer that the backends fuse with the undo."""

    rule: UpdateRule
    classes: tuple[type[Optimizer], ...]  # matched exactly, because a subclass may have another step()
    numbers: Callable[[Group], Any]  # a parameter group's hyper-parameters as the primitive takes them
    state: Callable[[Any], tuple[str, ...]]  # the names of the state that such a group uses


def _lr(group: Group) -> float | Tensor:
    """Return the learning rate; a tensor on an accelerator stays there."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _sgd(group: Group) -> SGDGroup:
    return SGDGroup(
        _lr(group),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
    )


def _adam(group: Group) -> AdamGroup:
    beta1, beta2 = group["betas"]
    return AdamGroup(
        _lr(group),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group.get("decoupled_weight_decay", False)),
        bool(group["amsgrad"]),
        bool(group["maximize"]),
    )


def _adamw(group: Group) -> AdamGroup:
    return _adam(group)._replace(decoupled_weight_decay=True)


def _lion(group: Group) -> LionGroup:
    beta1, beta2 = group["betas"]
    return LionGroup(_lr(group), float(beta1), float(beta2), float(group["weight_decay"]), bool(group["maximize"]))


_WITH_MOMENTUM, _WITHOUT = ("momentum_buffer",), ()
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_AMSGRAD_STATE = (*_ADAM_STATE, "max_exp_avg_sq")


def _adam_state(group: AdamGroup) -> tuple[str, ...]:
    return _AMSGRAD_STATE if group.amsgrad else _ADAM_STATE


FUSED = (
    Fused(SGD, (torch.optim.SGD,), _sgd, lambda group: _WITH_MOMENTUM if group.momentum != 0 else _WITHOUT),
    Fused(ADAM, (torch.optim.Adam,), _adam, _adam_state),
    Fused(ADAM, (torch.optim.AdamW,), _adamw, _adam_state),
    Fused(LION, (Lion,), _lion, lambda group: ("exp_avg",)),
)


class FusedBase:
    """A base optimizer whose update is one primitive: it undoes the perturbation and takes the step."""

    def __init__(self, fused: Fused, cls: type[Optimizer], defaults: dict[str, Any]) -> None:
        self.cls = cls
        self.rule: UpdateRule | None = fused.rule
        self.defaults = defaults
        self._numbers = fused.numbers
        self._state = fused.state

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        numbers = list(map(self._numbers, groups))
        return numbers, tuple(map(self._state, numbers))

    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        for call in update.restore:
            call.backend.restore(call.table)
        if self.rule is SGD:
            for group in groups:
                if group.dampening != 0:
                    note_written_momentum(update)
                    break
        marks = status.marks  # of an earlier call that an exception has ended: what it has completed
        for k, call in enumerate(update.calls):
            if marks[UPDATED] <= k:
                call.backend.update(call.table, groups, status, grad_scale, max_norm)
                marks[UPDATED] = k + 1
        for step in update.empty_steps:
            step += status.skip == 0


def note_written_momentum(update: UpdatePlan) -> None:
    """Turn -0.0 into 0.0 in momentum that somebody else has written, such as a mask that multiplies it by 0.

    The kernels take -0.0 for a momentum that was never written, which matters with dampening only. They do not raise
    the version counter of state, so that a new version is a user's write.
    """
    for call in update.calls:
        for momentum in call.table.state["momentum_buffer"]:
            if momentum is None:
                continue
            if getattr(momentum, _VERSION, momentum._version) != momentum._version:
                momentum.add_(0.0)
            setattr(momentum, _VERSION, momentum._version)


class WrappedBase:
    """Any other optimizer class, on the facade's own groups and state."""

    rule: UpdateRule | None = None

    def __init__(self, optimizer: Optimizer, inner: Optimizer) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self.cls = type(inner)
        self.defaults = inner.defaults

    def numbers(self, groups: Sequence[Group]) -> tuple[list[Any], tuple[tuple[str, ...], ...]]:
        return [], tuple(() for _ in groups)

    @torch.no_grad()
    def step(
        self,
        update: UpdatePlan,
        snapshot: GradSnapshot,
        groups: Sequence[Any],
        status: Status,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> None:
        for call in update.perturbed:
            call.backend.restore(call.table)
        status.marks[UPDATED] = 1  # what follows is the base optimizer's own, and nothing is left to undo
        if status.skip:
            return
        present = snapshot.present()
        if present and (grad_scale is not None or max_norm < math.inf):
            torch._foreach_mul_(present, grad_factor(False, status, grad_scale, max_norm))
        step = type(self._share()).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]  # the facade's step runs the hooks
        step(self._inner)

    def modes(self) -> list[str]:
        """Return which of train() and eval() the optimizer has. Schedule-free ones evaluate with other weights."""
        return [mode for mode in ("train", "eval") if callable(getattr(self._inner, mode, None))]

    def set_mode(self, mode: str) -> None:
        """Call the optimizer's train() or eval()."""
        getattr(self._share(), mode)()

    def _share(self) -> Optimizer:
        """Return the optimizer, on the facade's groups and state."""
        self._inner.state = self._optimizer.state
        self._inner.param_groups = self._optimizer.param_groups
        return self._inner


def make_base(base: Callable[..., Optimizer], optimizer: Optimizer, options: dict[str, Any]) -> Base:
    """Return the base optimizer `base(groups, **options)` over the groups and the state of `optimizer`.

    Raises what `base` raises for options that it does not take, and TypeError if it does not make an optimizer.
    """
    inner = base(optimizer.param_groups, **options)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"base_optimizer {base!r} returned {type(inner).__name__}, not a torch.optim.Optimizer")
    cls = type(inner)
    check_base_class(cls)
    if [list(map(id, group["params"])) for group in inner.param_groups] != [
        list(map(id, group["params"])) for group in optimizer.param_groups
    ]:
        raise TypeError(f"base_optimizer {base!r} made an optimizer of other parameters than those it was given")
    optimizer.param_groups = inner.param_groups
    for p, entry in inner.state.items():  # Adagrad fills its state before the first step
        optimizer.state.setdefault(p, entry)
    if not any(group.get("differentiable") for group in inner.param_groups):
        for fused in FUSED:
            if cls in fused.classes:
                return FusedBase(fused, cls, inner.defaults)
    return WrappedBase(optimizer, inner)


def fused_names() -> str:
    """Return the names of the fused base optimizers, for errors."""
    names = [cls.__name__ for fused in FUSED for cls in fused.classes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_base(base: Any) -> None:
    """Raise TypeError for anything but an optimizer class, or a callable that may make an optimizer."""
    if isinstance(base, Optimizer):
        raise TypeError(
            f"base_optimizer is an instance of {type(base).__name__}; pass the class, and its options as keywords: "
            f"SAM(params, {type(base).__name__}, lr=..., ...)"
        )
    if isinstance(base, type) and issubclass(base, Optimizer):
        check_base_class(base)
    elif isinstance(base, type) or not callable(base):
        raise TypeError(
            "base_optimizer must be a torch.optim.Optimizer class such as torch.optim.SGD, or a callable that makes an "
            f"optimizer of parameter groups, such as functools.partial(torch.optim.SGD, lr=0.1), not {base!r}"
        )


def option_names(base: Callable[..., Optimizer]) -> Collection[str]:
    """Return the names of the options that a base optimizer takes, as far as its signature lists them."""
    try:
        return inspect.signature(base).parameters
    except (TypeError, ValueError):  # a callable of C
        return ()


def check_base_class(cls: type[Optimizer]) -> None:
    """Raise TypeError for an optimizer class that SAM cannot take as its base optimizer."""
    clash = [name for name in ("rho", "adaptive", "eta", "perturb") if name in inspect.signature(cls).parameters]
    if clash:
        raise TypeError(
            f"{cls.__name__} has an option {clash[0]!r} of its own, which in SAM's groups is SAM's: "
            "it cannot be SAM's base optimizer"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{cls.__name__}.step needs a closure of its own and cannot be SAM's base optimizer")
