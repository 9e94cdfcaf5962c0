"""What a SAM optimizer does beneath its public face: plan, status, norms, climbing, judging, updating.

fused_sam/sam.py is the face; the methods of the family fill in the hooks that are declared there.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam import backends
from fused_sam.backends.contract import (
    DRAWS,
    LOW_PRECISION,
    SKIP,
    STATUS_SIZE,
    SUM,
    Backend,
    Group,
    status_dtype,
)
from fused_sam.schedule import Schedule

from .base_optimizers import Base
from .calls import Job, Scan, attached
from .options import check_options
from .plan import Plan, Precision
from .rounding import warn_of_rounding
from .sharding import local
from .stale_grads import mark_used
from .user_warnings import warn_of_plain_step


class Engine(Optimizer):
    """The part of SAM that calls primitives. Not for use by itself."""

    # Set by SAM's constructor.
    _backend: Backend
    _base: Base
    _base_class: type[Optimizer]
    _base_options: dict[str, Any]
    _backend_name: str
    _check_update: bool
    _eps: float
    _max_norm: float
    _own_options: tuple[str, ...]
    _precision: Precision
    _schedule: Schedule | None

    @property
    def perturbs(self) -> bool:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError

    # ---- what the methods of the family (fused_sam/methods) say about themselves --------------------------

    # Attributes that a copy of the optimizer has, beside state and groups.
    _copied: tuple[str, ...] = (
        "_eps", "_max_norm", "_precision", "_schedule", "_backend_name", "_check_update", "_base_class",
        "_base_options", "_own_options",
    )  # fmt: skip

    # Whether the first gradients are needed after the second pass. Then first_step() takes them from the parameters,
    # and `_kept` has them for `_descent`: one tensor for each of the plan's parameters, or None.
    _keeps_gradients = False

    # Whether the update is skipped where the climb was: not where no climb goes with it.
    _carries_skip = True

    # Whether the update's gradients are others than those that GradScaler looked through: then they are judged as well.
    _recombines = False

    # Whether this climb is skipped where the one before it was: of the same step, on another micro-batch.
    _climbs_on = False

    # What the first gradients were multiplied by, for methods and schedules that compare gradients of different steps.
    # Set it for each step, before `perturbs` is asked, where needs_scale says so and a GradScaler is used:
    # scaler.get_scale(). An update forgets it.
    loss_scale: Tensor | float | None = None

    @property
    def needs_scale(self) -> bool:
        """Whether `loss_scale` must be told under a GradScaler."""
        return self._schedule is not None and self._schedule.needs_scale

    # Set by fused_sam.training.local_perturbation: processes whose perturbations differ, and which must skip together.
    process_group_of_skip: Any = None

    def _own_defaults(self) -> dict[str, Any]:
        """Options and counters of the method, which every group gets and a state_dict carries."""
        own: dict[str, Any] = {"draws": 0} if self._precision.stochastic_rounding else {}
        return own if self._schedule is None else {**own, **self._schedule.memory()}

    def _may_perturb(self) -> bool:
        """Whether this step perturbs as far as is known before there are gradients."""
        if self._schedule is not None and not self._schedule.needs_gradients:
            return self.perturbs
        return self._perturbs(self._groups())

    def _due(self) -> bool:
        """Whether the method wants this step to perturb; asked once a step, where rho is not 0."""
        return self._schedule is None or self._schedule.due(self)

    def _first_pass(self) -> AbstractContextManager[None]:
        """What step(closure) wraps its first evaluation in."""
        return nullcontext()

    def _ascent(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        """Change the first gradients in place, before their norm is taken."""

    def _descent(self, plan: Plan, scan: Scan, groups: list[Group], *, perturbed: bool) -> None:
        """Change the gradients of the update, in place or for others of the same layout, before they are judged."""

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        """The update has happened (or was skipped, which only the status knows)."""

    def _divisor(self) -> Tensor | None:
        """What the gradients of the update are to be divided by: the loss scale under GradScaler."""
        return getattr(self, "grad_scale", None)

    # ---- within -------------------------------------------------------------------------------------------

    _plan: Plan | None = None
    _perturbed: list[Job] | None = None  # what first_step() perturbed; None: it was not called
    _kept: list[Tensor | None] | None = None
    _decision: bool | None = None  # whether this step perturbs; None: not asked yet
    _lent = False  # inside `with unperturbed()`
    _knows_two_steps = False  # first_step() was called or `perturbs` asked, or a warning given that neither was
    _took_update_norm = False
    _had_gradients = False
    _scale: Tensor | None = None  # that the last update's gradients had
    _numbers: Tensor | None = None
    _host_numbers: array[float] | None = None  # the same memory, where it is the host's: read without a call into torch

    def _forget(self) -> None:
        self._perturbed = self._decision = self._kept = self._scale = None
        self._numbers = None
        self._host_numbers = None

    def _new_plan(self) -> Plan:
        return Plan(self.param_groups, self._backend, self._precision)

    def _check_precision(self) -> None:
        """Options for bf16 and fp16 weights against the weights there are."""
        low = [p for p in self._parameters() if p.dtype in LOW_PRECISION]
        for name in ("master_weights", "stochastic_rounding"):
            if getattr(self._precision, name) and not low:
                raise ValueError(f"{name}=True is for bf16 and fp16 weights, and there are none: leave it out")
            if getattr(self._precision, name) and not self._base.fused:
                raise ValueError(
                    f"{name} needs a fused base optimizer (SGD, Adam or AdamW), not {self._base_class.__name__}"
                )
        if low and not (self._precision.master_weights or self._precision.stochastic_rounding):
            warn_of_rounding(self.param_groups)

    def _random(self, groups: Sequence[Group]) -> bool:
        return self._precision.stochastic_rounding or any(g.share < 1 for g in groups[:1])  # ESAM's, alike in all

    def _drew(self, groups: Sequence[Group]) -> None:
        """A primitive has drawn random numbers: the next one draws others."""
        if self._random(groups):
            self._status()[DRAWS].add_(1).remainder_(2**24)  # fp32 counts no further

    def _count_draws(self) -> None:
        """Note in the groups how often random numbers were drawn, for who saves them."""
        if self._numbers is not None and "draws" in self._own_options:
            for group in self.param_groups:
                group["draws"] = int(self._numbers[DRAWS])

    def _wrote(self) -> None:
        if self._plan is not None:
            self._plan.masters.wrote()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _device(self) -> torch.device:
        for group in self.param_groups:
            for p in group["params"]:
                return p.device
        return torch.device("cpu")

    def _status(self) -> Tensor:
        """What the primitives leave for each other: backends/contract.py names its places."""
        device = self._device()
        if self._numbers is None or self._numbers.device != device:
            self._count_draws()
            if device.type == "cpu":
                self._host_numbers = array("d", bytes(8 * STATUS_SIZE))
                self._numbers = torch.frombuffer(self._host_numbers, dtype=status_dtype(device))
            else:
                self._host_numbers = None
                self._numbers = torch.zeros(STATUS_SIZE, dtype=status_dtype(device), device=device)
            if self.param_groups and "draws" in self._own_options:
                self._numbers[DRAWS] = self.param_groups[0].get("draws", 0)
        return self._numbers

    def _known_skip(self) -> bool:
        """Whether the host knows that this step is skipped; on an accelerator only the kernels do."""
        return self._host_numbers is not None and self._host_numbers[SKIP] != 0

    def _groups(self) -> list[Group]:
        return [self._group_numbers(group, k) for k, group in enumerate(self.param_groups)]

    def _group_numbers(self, group: dict[str, Any], k: int) -> Group:
        try:
            numbers = self._base.numbers(group)
        except (TypeError, ValueError, RuntimeError):
            check_options(group, k)
            raise
        if not (0 <= numbers.rho < math.inf and 0 <= numbers.eta < math.inf):
            check_options(group, k)
        return numbers

    def _takes_part(self) -> list[bool]:
        """For each of `_groups()` whether it is perturbed and counted in the norm."""
        return [group["perturb"] for group in self.param_groups]

    def _perturbs(self, groups: list[Group]) -> bool:
        return any(g.rho > 0 and part for g, part in zip(groups, self._takes_part(), strict=True))

    def _planned(self) -> Plan:
        """The plan, made anew if parameters were added, exchanged or moved."""
        plan = self._plan
        if plan is None or not plan.holds(self.param_groups):
            device = self._device()
            if plan is not None and plan.params and plan.params[0].device != device:
                self._backend = backends.choose(self._backend_name, device)
            fresh = self._new_plan()
            if plan is not None:
                fresh.inherit(plan)
                if self._kept is not None:
                    kept = dict(zip(plan.owners, self._kept, strict=True))
                    self._kept = [kept.get(p) for p in fresh.owners]
                if self._perturbed is not None:
                    self._perturbed = fresh.adopt(plan, self._perturbed)
            self._plan = plan = fresh
        return plan

    def _scan(self) -> tuple[Plan, Scan]:
        """The gradients as they are now, and the plan for them."""
        plan = self._plan
        scan = plan.scan(self.param_groups) if plan is not None else None
        if plan is None or scan is None:
            plan = self._planned()
            scan = plan.scan(self.param_groups)
            assert scan is not None  # the plan was made from these groups
        if not self._had_gradients:
            self._had_gradients = any(scan.codes) or plan.sharding is not None
            if not self._had_gradients and _is_distributed():
                raise RuntimeError(
                    "none of the optimizer's parameters has ever had a gradient: if the model was sharded or replaced "
                    "(fully_shard, parallelize_module, .to()) after the optimizer was built, build the optimizer over "
                    "the model's parameters after that; else run backward() first"
                )
        return plan, scan

    def _climb(self, groups: list[Group]) -> None:
        """Perturb the weights along the gradients as they are."""
        plan, scan = self._scan()
        jobs = plan.perturbation(scan, self._takes_part(), self.state)
        with attached(jobs, scan):
            self._ascent(plan, scan, groups)
            self._norm(plan, jobs, scan, groups, scaled=True, carry=self._climbs_on)
            for job in jobs:
                job.backend.perturb(job.table, groups, self._status())
        self._perturbed = jobs
        self._kept = self._take_gradients(scan) if self._keeps_gradients else None
        self._drew(groups)
        self._wrote()

    def _take_gradients(self, scan: Scan) -> list[Tensor | None]:
        """The gradients, which the parameters let go of: backward() then makes new ones beside them."""
        kept = [None if g is None else standalone(g) for g in scan.gradients]
        for p in self._parameters():
            p.grad = None
        return kept

    def _norm(
        self,
        plan: Plan,
        jobs: list[Job],
        scan: Scan,
        groups: list[Group],
        *,
        scaled: bool,
        carry: bool,
        status: Tensor | None = None,
    ) -> None:
        """P1 over all tables and, where weights are spread over processes, over all of these."""
        status = self._status() if status is None else status
        if plan.sharding is not None:
            if not carry:
                status[SKIP] = 0
            total = status.new_zeros(())
            for job in jobs:
                job.backend.norm(
                    job.table, groups, status, scaled=scaled, carry=True, begin=True, finish=False, eps=self._eps
                )
                total += status[SUM] * job.share
            status[SUM] = total
            plan.sharding.reduce(status, scan.pattern())
            self._backend.finish(status, scaled=scaled, carry=True, eps=self._eps)
            return
        if not jobs:
            status[SUM] = 0
            self._backend.finish(status, scaled=scaled, carry=carry, eps=self._eps)
        for i, job in enumerate(jobs):
            first, last = i == 0, i == len(jobs) - 1
            job.backend.norm(
                job.table, groups, status, scaled=scaled, carry=carry, begin=first, finish=last, eps=self._eps
            )

    def _step(self) -> None:
        """Update with the gradients as they are, undoing the perturbation if there is one."""
        self._refuse_misuse("a step")
        try:
            groups = self._groups()
            plan, scan = self._scan()
            perturbed = self._perturbed is not None
            if not (perturbed or self._knows_two_steps):
                self._tell_of_plain_step(groups)
            undo = plan.nothing if self._perturbed is None else self._perturbed
            update = plan.update(scan, undo, self._base.needs(groups), self.state)
            self._scale = self._divisor()
            self._descent(plan, scan, groups, perturbed=perturbed)
            with attached(update.jobs, scan):
                self._judge(plan, update.jobs, scan, groups, carry=perturbed and self._carries_skip)
                self._base.step(update, scan, groups, self._status(), self._scale)
            if not self._known_skip():
                update.commit(self.state)
        except BaseException:
            self.restore()
            raise
        self._perturbed = None
        self._drew(groups)
        self._wrote()
        mark_used(scan.present())
        if self._schedule is not None:
            self._schedule.stepped(self)
        self._updated(plan, scan, groups)
        self._decision = self._kept = self.loss_scale = None

    def _tell_of_plain_step(self, groups: list[Group]) -> None:
        """Once, where the first update of all is a plain step: not where its rate is 0, as a framework's is that only
        wants state to be there."""
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        moves = any((isinstance(r, Tensor) and r.device.type != "cpu") or float(r) != 0 for r in rates)
        if moves and self._perturbs(groups):
            self._knows_two_steps = True
            warn_of_plain_step(type(self).__name__, self._base_class.__name__)

    def _judge(self, plan: Plan, jobs: list[Job], scan: Scan, groups: list[Group], *, carry: bool) -> None:
        """Set SKIP where this update's gradients are not finite; carry: or where the first ones were not."""
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler's sum over no gradients at all is a plain 0
            found_inf = None
        skip = self._status()[SKIP : SKIP + 1]
        if found_inf is not None:  # GradScaler has looked at every gradient; never negative, and not 0 skips
            if not carry:
                skip.fill_(0)
            skip.add_(found_inf.reshape(1).to(skip, non_blocking=True))
            carry = True
        clips = self._max_norm < math.inf
        self._took_update_norm = clips or (self._check_update and (found_inf is None or self._recombines))
        if self._took_update_norm:
            self._norm(plan, jobs, scan, groups, scaled=False, carry=carry)
        elif not carry:
            skip.fill_(0)
        elif plan.sharding is not None and found_inf is not None:
            self._status()[SUM] = 0
            plan.sharding.reduce(self._status(), scan.pattern())
        if self.process_group_of_skip is not None:
            torch.distributed.all_reduce(skip, torch.distributed.ReduceOp.MAX, group=self.process_group_of_skip)

    def _refuse_misuse(self, what: str) -> None:
        if "_backend" not in self.__dict__:
            raise RuntimeError(
                f"{what} was called on a wrapper around the optimizer: "
                "call it on the SAM optimizer itself, which Lightning and accelerate keep as `.optimizer`"
            )
        if self._lent:
            raise RuntimeError(
                f"{what} inside `with optimizer.unperturbed():`, after which the weights are perturbed again: "
                "leave it first"
            )

    def _refuse_perturbed(self, what: str) -> None:
        if self._perturbed is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), where the weights are perturbed: "
                "call second_step() to finish the step, restore() to undo it, or do this "
                "inside `with optimizer.unperturbed():`"
            )


def standalone(g: Tensor) -> Tensor:
    """The gradient, copied where it is part of something larger: backward() writes DistributedDataParallel's buckets
    again."""
    part = local(g)
    whole = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return g if whole else g.clone(memory_format=torch.preserve_format)


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
