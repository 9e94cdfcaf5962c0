"""Parameters that are displaced between steps, for methods of one pass.

A displacement is a perturbation along a vector that is known before the step, such as the momentum, with a backup. The
next update undoes it. It has a status of its own, because whether the last update was skipped is still to be read.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import RNG_OFFSET, PerturbGroup, Status

from .calls import GradSnapshot
from .plan import Plan
from .stepper import Stepper, with_twins

_EMPTY: dict[str, Any] = {}


class Displacement(ABC):
    """Displaces a stepper's parameters between two steps.

    Attributes:
        status: the numbers of the last displacement.
        ready: True if the displacement of the coming step was decided, and made if it was to be.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.status: Status | None = None
        self.ready = False

    @abstractmethod
    def begun(self) -> bool:
        """Return True if parameters can be displaced: mostly from the second step on."""

    @abstractmethod
    def write(self, groups: list[PerturbGroup], status: Status) -> bool:
        """Displace clean parameters, so that `undo` restores what an exception has left; return True if any moved."""

    @torch.no_grad()
    def displace(self, *, wanted: bool) -> None:
        """Displace clean parameters, if `wanted` and if it has begun."""
        stepper = self.stepper
        if stepper.perturbed is not None:  # in part, by a displacement that an exception has ended
            stepper.undo()
        groups = stepper.perturb_groups()
        if wanted and stepper.any_perturbed(groups) and self.begun() and self.write(groups, self.new_status()):
            stepper.after_write(perturbed=True)
        self.ready = True  # last, so that train() repeats what an exception has ended

    def new_status(self) -> Status:
        """Return the status of the coming displacement, on the parameters' device."""
        theirs = self.stepper.status
        if self.status is None or self.status.device != theirs.device:
            self.status = Status(theirs.device)
        self.status.values[RNG_OFFSET] = theirs.rng_offset
        return self.status

    def restore(self) -> None:
        """Restore the clean parameters; a displacement after that draws the numbers of the last one."""
        stepper = self.stepper
        if stepper.perturbed is not None:
            stepper.restore()
            if stepper.settings.precision.stochastic_rounding:
                stepper.rewind_rng()


class AlongVector(Displacement):
    """Displaces by sign * rho * v / ||v||, where `vector` gives v."""

    sign = 1.0

    @abstractmethod
    def vector(self, plan: Plan) -> GradSnapshot:
        """Return v: a tensor, or None, for each of the plan's parameters."""

    def write(self, groups: list[PerturbGroup], status: Status) -> bool:
        stepper = self.stepper
        plan = stepper.current_plan()
        vector = self.vector(plan)
        calls = plan.perturb_calls(vector, stepper.perturb_flags(), stepper.optimizer.state)
        if not calls:
            return False
        groups = [g._replace(rho=self.sign * g.rho) for g in groups]
        if plan.has_twins:
            groups = with_twins(groups)
        plan.attach(calls, vector)
        try:
            stepper.norm(plan, calls, vector, groups, status, keep_skip=False)
            stepper.write_perturbation(calls, groups, status)
        finally:
            plan.detach(calls)
        return True


class AlongState(AlongVector):
    """Displaces along vectors of the optimizer's state.

    The vectors are sorted again only if other tensors hold them.
    """

    def __init__(self, stepper: Stepper) -> None:
        super().__init__(stepper)
        self._sorted: tuple[Plan, list[Any], GradSnapshot] | None = None  # as they were found last

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return for each parameter group the name of its vector in the state; "" if it has none."""

    def begun(self) -> bool:
        names = set(self.names()) - {""}
        return any(name in entry for entry in self.stepper.optimizer.state.values() for name in names)

    def vector(self, plan: Plan) -> GradSnapshot:
        state = self.stepper.optimizer.state
        by_group = self.names()
        n = len(by_group)
        names = [by_group[k % n] for k in plan.group_ids]
        held: list[Tensor | None] = [
            state.get(p, _EMPTY).get(name) for p, name in zip(plan.params, names, strict=True)
        ]
        if self._sorted is None or self._sorted[0] is not plan or not all(map(operator.is_, held, self._sorted[1])):
            parts = [plan.state_part(state, i, name, init=False) if name else None for i, name in enumerate(names)]
            held = [state.get(p, _EMPTY).get(name) for p, name in zip(plan.params, names, strict=True)]
            self._sorted = plan, held, plan.snapshot_of(parts)
        return self._sorted[2]


class AgainstMomentum(AlongState):
    """Displaces against the base optimizer's momentum."""

    sign = -1.0

    def names(self) -> Sequence[str]:
        stepper = self.stepper
        rule = stepper.base.rule
        first = rule.buffers()[0] if rule is not None else ""
        _, used = stepper.base.numbers(stepper.optimizer.param_groups)
        return [first if first in names else "" for names in used]


class AlongLastGradient(AlongState):
    """Displaces along the gradient of the last update, which the method keeps in the state under this name."""

    NAME = "last_gradient"

    def names(self) -> Sequence[str]:
        return [self.NAME] * len(self.stepper.optimizer.param_groups)
