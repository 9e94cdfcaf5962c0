"""The second half of a SAM step: undo the perturbation and let the base optimizer move the weights.

torch.optim.SGD, Adam and AdamW are fused with the undo into one pass; any other optimizer class runs its own step on
restored weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam.backends.contract import SKIP, Group
from fused_sam.backends.reference import gradient_factor

from .calls import Job, Scan, Update


class Base(Protocol):
    """What the facade asks of a base optimizer."""

    defaults: dict[str, Any]
    fused: bool

    def numbers(self, group: dict[str, Any]) -> Group:
        """A parameter group's hyper-parameters as the primitives take them."""

    def needs(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        """For each group the names of the state that a fused update reads and writes."""

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        """Undo the perturbation and take one step, or only undo it where the status says to skip."""


def make_base(cls: type[Optimizer], optimizer: Optimizer, options: dict[str, Any], max_norm: float) -> Base:
    """The base optimizer `cls(**options)` over the groups and the state of `optimizer`, clipping to `max_norm`.

    Raises whatever `cls` raises for options that it does not take.
    """
    inner = cls(optimizer.param_groups, **options)
    differentiable = any(g.get("differentiable") for g in inner.param_groups)
    optimizer.param_groups = inner.param_groups
    for p, entry in inner.state.items():  # Adagrad fills its state before the first step
        optimizer.state.setdefault(p, entry)
    if cls is torch.optim.SGD and not differentiable:
        return FusedSGD(inner.defaults, max_norm)
    if cls in (torch.optim.Adam, torch.optim.AdamW) and not differentiable:
        return FusedAdam(inner.defaults, max_norm, decoupled=cls is torch.optim.AdamW)
    return Wrapped(optimizer, inner, max_norm)


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


class Fused:
    """What the fused updates share: undo what has no gradient any more, then one primitive over everything else."""

    fused = True

    def __init__(self, defaults: dict[str, Any], max_norm: float) -> None:
        self.defaults = defaults
        self._max_norm = max_norm

    def _update(self, job: Job, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        raise NotImplementedError

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        for job in update.restore:
            job.backend.restore(job.table)
        for job in update.jobs:
            self._update(job, groups, status, grad_scale)


class FusedSGD(Fused):
    """torch.optim.SGD, fused with the undo: primitive P3."""

    def numbers(self, group: dict[str, Any]) -> Group:
        return Group(  # by position, which takes half the time
            float(group["rho"]),
            bool(group["adaptive"]),
            float(group["eta"]),
            _rate(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
            self._max_norm,
        )

    def needs(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        return tuple(("momentum_buffer",) if g.momentum != 0 else () for g in groups)

    def _update(self, job: Job, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        job.backend.sgd(job.table, groups, status, grad_scale)


class FusedAdam(Fused):
    """torch.optim.Adam or AdamW, fused with the undo: primitive P7."""

    def __init__(self, defaults: dict[str, Any], max_norm: float, *, decoupled: bool) -> None:
        super().__init__(defaults, max_norm)
        self._decoupled = decoupled

    def numbers(self, group: dict[str, Any]) -> Group:
        beta1, beta2 = map(float, group["betas"])
        return Group(
            rho=float(group["rho"]),
            adaptive=bool(group["adaptive"]),
            eta=float(group["eta"]),
            lr=_rate(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            max_norm=self._max_norm,
            beta1=beta1,
            beta2=beta2,
            adam_eps=float(group["eps"]),
            decoupled=self._decoupled or bool(group.get("decoupled_weight_decay", False)),
            amsgrad=bool(group["amsgrad"]),
        )

    def needs(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        moments = ("step", "exp_avg", "exp_avg_sq")
        return tuple((*moments, "max_exp_avg_sq") if g.amsgrad else moments for g in groups)

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        super().step(update, scan, groups, status, grad_scale)
        for t in update.idle_steps:
            t += status[SKIP] == 0

    def _update(self, job: Job, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        job.backend.adam(job.table, groups, status, grad_scale)


class Wrapped:
    """Any other optimizer class, on the facade's own groups and state."""

    fused = False

    def __init__(self, optimizer: Optimizer, inner: Optimizer, max_norm: float) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self._max_norm = max_norm
        self.defaults = inner.defaults

    def numbers(self, group: dict[str, Any]) -> Group:
        rho, adaptive, eta = float(group["rho"]), bool(group["adaptive"]), float(group["eta"])
        return Group(rho, adaptive, eta, max_norm=self._max_norm)

    def needs(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        return tuple(() for _ in groups)

    def step(
        self, update: Update, scan: Scan, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> None:
        for job in update.perturbed:
            job.backend.restore(job.table)
        if status[SKIP]:
            return
        present = scan.present()
        if present and (grad_scale is not None or self._max_norm < math.inf):
            factor = gradient_factor(groups[0]._replace(maximize=False), status, grad_scale)
            torch._foreach_mul_(present, factor)
        step = type(self._share()).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # type: ignore[attr-defined]  # the facade's step runs the hooks
        step(self._inner)

    def modes(self) -> list[str]:
        """Which of train() and eval() the optimizer has: schedule-free ones hold other weights for evaluating."""
        return [mode for mode in ("train", "eval") if callable(getattr(self._inner, mode, None))]

    def switch(self, mode: str) -> None:
        getattr(self._share(), mode)()

    def _share(self) -> Optimizer:
        """The optimizer, with the facade's groups and state."""
        self._inner.state = self._optimizer.state
        self._inner.param_groups = self._optimizer.param_groups
        return self._inner
