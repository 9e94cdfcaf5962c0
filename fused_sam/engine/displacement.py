"""Parameters that are displaced against the momentum between steps, for methods of one pass.

The displacement is a perturbation with v in place of g: norm and perturb along -v, with a backup. The next update
undoes it. It has a status of its own, because whether the last update was skipped is still to be read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import RNG_OFFSET, Status

from .calls import GradSnapshot
from .plan import Plan

_EMPTY: dict[str, Any] = {}


class Displacement:
    """Displaces a stepper's parameters against the base optimizer's momentum.

    Attributes:
        status: the numbers of the last displacement.
        ready: True if the displacement of the coming step was decided, and made if it was to be.
    """

    def __init__(self, stepper: Any) -> None:
        self._stepper = stepper
        self.status: Status | None = None
        self.ready = False
        self._sorted: tuple[Plan, list[Any], GradSnapshot] | None = None  # the momentum as it was found last

    def names(self) -> list[str]:
        """Return for each parameter group the name of its momentum in the state; "" if it has none."""
        stepper = self._stepper
        rule = stepper.base.rule
        first = rule.buffers()[0] if rule is not None else ""
        _, used = stepper.base.numbers(stepper.optimizer.param_groups)
        return [first if first in names else "" for names in used]

    def has_momentum(self) -> bool:
        """Return True if any parameter has a momentum."""
        names = set(self.names()) - {""}
        return any(name in entry for entry in self._stepper.optimizer.state.values() for name in names)

    @torch.no_grad()
    def displace(self, *, wanted: bool) -> None:
        """Displace clean parameters by rho along -v, if `wanted` and if there is momentum."""
        stepper = self._stepper
        self._displace(stepper, wanted)
        self.ready = True  # last, so that train() repeats what an exception has ended

    def _displace(self, stepper: Any, wanted: bool) -> None:
        if stepper.perturbed is not None:  # in part, by a displacement that an exception has ended
            stepper.undo()
        groups = [g._replace(rho=-g.rho) for g in stepper.perturb_groups()]
        if not wanted or all(g.rho == 0 for g in groups) or not self.has_momentum():
            return
        plan = stepper.current_plan()
        momentum = self._momentum(plan)
        calls = plan.perturb_calls(momentum, stepper.perturb_flags(), stepper.optimizer.state)
        if not calls:
            return
        if self.status is None or self.status.device != stepper.status.device:
            self.status = Status(stepper.status.device)
        status = self.status
        status.values[RNG_OFFSET] = stepper.status.rng_offset
        plan.attach(calls, momentum)
        try:
            stepper.norm(plan, calls, momentum, groups, status, keep_skip=False)
            stepper.write_perturbation(calls, groups, status)
        finally:
            plan.detach(calls)
        stepper.after_write(perturbed=True)

    def restore(self) -> None:
        """Restore the clean parameters; a displacement after that draws the numbers of the last one."""
        stepper = self._stepper
        if stepper.perturbed is not None:
            stepper.restore()
            if stepper.settings.precision.stochastic_rounding:
                stepper.rewind_rng()

    def _momentum(self, plan: Plan) -> GradSnapshot:
        """Return the momentum of every parameter that has any, sorted again only if other tensors hold it."""
        state = self._stepper.optimizer.state
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
