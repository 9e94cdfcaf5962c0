"""Displacements by random numbers: of trainable weights by one length, and of frozen weights row by row.

The numbers are a function of the seed, of the number of the step, of the parameter and of the element, see rng.py. So
they are the same on every backend and replica, after resuming, and however the weights are sharded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_sam.backends.contract import ASCENT_NORM, NOISE, PERTURBED, PerturbGroup, Status, arithmetic_dtype
from fused_sam.backends.rng import fill_normal, normal_of, stream_key, words_at

from .calls import GradSnapshot
from .displacement import AlongVector, Displacement
from .plan import Plan
from .sharding import is_sharded, local, positions_of, sums_of_rows
from .stepper import Stepper


def draw_normal(p: Tensor, seed: int, step: int, i: int) -> Tensor:
    """Return standard normal numbers for this process's part of parameter i, in its layout: fp32, or fp64 for fp64."""
    key, part = stream_key(seed, step, i, NOISE), local(p)
    drawn = torch.empty_like(part, dtype=arithmetic_dtype(part.dtype), requires_grad=False)
    if is_sharded(p):
        drawn.copy_(normal_of(words_at(key, positions_of(p)), drawn.dtype))
    else:
        fill_normal(key, drawn)
    return drawn


class AlongNoise(AlongVector):
    """Displaces trainable parameters by rho n / ||n||, n standard normal.

    Args:
        step: returns the number of the coming step; nothing is displaced before the first one was taken.
    """

    def __init__(self, stepper: Stepper, step: Callable[[], int]) -> None:
        super().__init__(stepper)
        self._step = step

    def begun(self) -> bool:
        return self._step() > 0

    def vector(self, plan: Plan) -> GradSnapshot:
        seed, step = self.stepper.settings.precision.seed, self._step()
        on = self.stepper.perturb_flags()
        drawn = [
            draw_normal(p, seed, step, i) if p.requires_grad and on[k % len(on)] else None
            for i, (p, k) in enumerate(zip(plan.params, plan.group_ids, strict=True))
        ]
        return plan.snapshot_of(drawn)


class RowNoise(Displacement):
    """Displaces frozen matrices: element j of row i by rho factor ||row i|| / sqrt(n) times a standard normal number.

    n is the number of elements of a row. Tensors are displaced one by one, so that the numbers of one of them are held.

    Args:
        step: returns the number of the coming step.
        factor: returns what each group's rho is multiplied by in that step.
    """

    def __init__(self, stepper: Stepper, step: Callable[[], int], factor: Callable[[], float]) -> None:
        super().__init__(stepper)
        self._step, self._factor = step, factor

    def begun(self) -> bool:
        return self._step() > 0

    def write(self, groups: list[PerturbGroup], status: Status) -> bool:
        stepper, factor = self.stepper, self._factor()
        plan, on = stepper.current_plan(), stepper.perturb_flags()
        k_of = [k % len(groups) for k in plan.group_ids]
        chosen = [
            is_frozen_matrix(p) and on[k] and groups[k].rho * factor > 0
            for p, k in zip(plan.params, k_of, strict=True)
        ]
        if not any(chosen):
            return False
        calls = plan.perturb_calls(GradSnapshot([], plan.codes_of(chosen)), on, stepper.optimizer.state)
        status.values[:ASCENT_NORM + 1] = 0
        stepper.marks = status.marks
        stepper.marks[PERTURBED] = 0
        stepper.perturbed = calls
        for done, call in enumerate(calls, 1):
            if not call.table.masters:  # those are the backup
                torch._foreach_copy_(call.table.backups, call.table.params)
            stepper.marks[PERTURBED] = done
            for i, part in zip(call.rows, call.table.params, strict=True):
                part.add_(self._row_noise(plan.params[i], i, groups[k_of[i]].rho * factor))
        return True

    def _row_noise(self, p: Tensor, i: int, rho: float) -> Tensor:
        noise = draw_normal(p, self.stepper.settings.precision.seed, self._step(), i)
        squares = sums_of_rows(p, local(p.detach()).to(noise.dtype).square())
        return noise.mul_((squares * (p.shape[0] / p.numel())).sqrt_().mul_(rho))


def is_frozen_matrix(p: Tensor) -> bool:
    """Return True for weights of two dimensions or more that are not trained and hold floating-point numbers."""
    return not p.requires_grad and p.grad is None and p.dim() > 1 and p.numel() > 0 and p.is_floating_point()
