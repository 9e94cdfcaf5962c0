"""The stepper: runs the two halves of a SAM step for an optimizer, by calls of primitives.

    perturb()   snapshot of the gradients, ascent hook, norm, radius hook, perturb
    update()    snapshot of the gradients, descent hook, finite check, undo and base update in one pass, updated hook

fused_sam/sam.py is the facade. The hooks are those of a method (fused_sam/methods), and get a Step (fused_sam/step.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam import backends
from fused_sam.backends.contract import (
    LION,
    LOW_PRECISION,
    PERTURBED,
    RNG_OFFSET,
    SKIP,
    SUM,
    UPDATE_NORM,
    UPDATED,
    PerturbGroup,
    Status,
    count_skipped_step,
)

from .base_optimizers import WrappedBase, fused_names, make_base
from .calls import GradSnapshot, KernelCall, UpdatePlan
from .loop_checks import FIRST_LOOK, LossCheck, PassCheck, look
from .options import check_group, overrides
from .parameters import device_of, is_distributed
from .plan import Plan, Precision
from .rounding import warn_of_rounding
from .stale_grads import BackwardWatch, any_grads
from .tensor_norms import SecondMoments, TensorNorms
from .user_warnings import warn_of_plain_step

_PERTURB = itemgetter("perturb")
_ATTEMPTS = 9  # to complete an update while interrupts go on


@dataclass(frozen=True)
class Settings:
    """SAM's options that are the same for all groups."""

    base_optimizer: Callable[..., Optimizer]  # a class, or what makes an optimizer of parameter groups
    base_options: dict[str, Any]
    backend: str
    eps: float
    max_norm: float  # inf: no clipping
    check_update: bool
    precision: Precision
    schedule: Any  # a fused_sam.schedule.Schedule, or None
    decay_in_ascent: bool = False
    own_options: tuple[str, ...] = ()  # names of what SAM has in a parameter group
    norm: str = "global"  # one of tensor_norms.NORMS


class Context(Protocol):
    """What the stepper calls during a step: fused_sam.step.Step, which calls the method's hooks."""

    def _run_ascent(self, plan: Plan, snapshot: GradSnapshot) -> None:
        """Run the ascent hook, before the norm."""

    def _run_radius(self, groups: list[PerturbGroup]) -> list[PerturbGroup]:
        """Run the radius hook, between norm and perturb; return the groups with their new rho."""

    def _run_descent(self, plan: Plan, snapshot: GradSnapshot) -> None:
        """Run the descent hook, before the finite check and the update."""

    def _run_updated(self) -> None:
        """Count the step and run the updated hook, after the update."""

    def _ask(self) -> bool:
        """Ask the schedule and the method whether this step perturbs."""

    def _replanned(self, old: Plan, new: Plan) -> None:
        """Reorder the ascent gradients for the new plan."""

    def _abandon(self) -> None:
        """Give the first gradients back to the parameters, because the perturbation failed."""

    def _end(self) -> None:
        """Drop everything that belongs to one step."""

    def _forget(self) -> None:
        """Forget everything, because the state was replaced."""

    def _settle(self) -> None:
        """Remove state that a skipped update created."""


class Stepper:
    """Perturbs, restores and updates an optimizer's parameters.

    Args:
        optimizer: whose param_groups and state are worked on.
        settings: its options.

    Attributes:
        perturbed: between the two halves of a step, the kernel calls that perturbed the parameters: an empty list if
            the step does not perturb. None outside of a step. It is set before the first of them runs.
        marks: marks[PERTURBED] says how many of these calls have written.
        status: the numbers that the primitives left.
        context: the Step that hooks get; SAM sets it.
    """

    context: Context
    _displacement: Any = None

    def __init__(self, optimizer: Any, settings: Settings) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.schedule = settings.schedule
        self.backend = backends.choose(settings.backend, self.device())
        self.base = make_base(settings.base_optimizer, optimizer, settings.base_options, settings.own_options)
        self.base.without_decay = optimizer.applies_decay
        self.check_decay_in_ascent(optimizer.param_groups)
        self.status = Status(self.device())
        self.perturbed: list[KernelCall] | None = None
        self.marks = self.status.marks
        self.decision: bool | None = None  # True if this step perturbs; None: not asked yet
        self.steps_ended = 0  # by an update, by restore() or by a load
        self.plain_step_warning_off = False  # True once first_step() or needs_second_pass was used, or it was given
        self.warned_of_abandoned_step = self.warned_of_skipped_steps = self.warned_of_options = False
        # What an update that has begun to write works on; `stage` is 1 once it is complete, and 2 once what follows is.
        self.unfinished: tuple[Plan, UpdatePlan, GradSnapshot, list[Any]] | None = None
        self.stage = 0
        self.updates = 0
        self.next_look = FIRST_LOOK  # after so many updates
        self.pass_check: PassCheck | None = PassCheck(self)  # of the first perturbing steps, in this order ...
        self.loss_check: LossCheck | None = LossCheck()  # ... and of the first losses
        self.in_closure = False  # True while step(closure) evaluates the closure
        self.suspended = False  # True inside `with unperturbed()`
        self.took_update_norm = False
        self.scaled_grads = False  # True if the update has unscaled and clipped the gradients in place
        self.keeps_skip = False  # True if the descent hook has set the skip flag
        self.changed_update = False  # True if the descent hook has changed the gradients of the update
        self.grad_scale: Tensor | None = None  # that the last update's gradients had
        self.ascent_scale: Any = None  # that the last first_step()'s gradients had, if it is known
        self.grads_unscaled = False  # True if scaler.unscale_() was called since the last half of a step
        self.noted_scale: Tensor | None = None  # GradScaler's, when unscale_() was called last
        self.skip_process_group: Any = None  # of processes whose perturbations differ and which must skip together
        self.grads_used = False  # True if the gradients may be those of an update, or of a step that was undone
        self._state = optimizer.state  # whose tensors the plan's tables hold
        self._watch: BackwardWatch | None = None  # for step(closure)
        self.had_gradients = False  # True if a gradient was ever there
        self._perturb_drew = False  # True if the last perturbation drew random numbers
        cls = type(optimizer)
        hooks = ("ascent", "radius", "descent", "updated", "wants_perturbation")
        self._has_hooks = (
            self.schedule is not None
            or settings.decay_in_ascent
            or cls.keeps_ascent_grad
            or any(overrides(cls, h) for h in hooks)
        )
        self._is_scaled = optimizer.is_scaled if overrides(cls, "is_scaled") else None
        # Of methods with norms per tensor or group, and of those with T_w from Adam's second moments; else None.
        self.second_moments = SecondMoments() if cls.preconditions else None
        per_tensor = settings.norm != "global" or cls.reads_weight_norms or cls.preconditions
        self.tensor_norms = TensorNorms(settings.norm, weights=cls.reads_weight_norms) if per_tensor else None
        self._check_precision()
        self.plan = self.new_plan()
        self._load_rng_offset()

    # ---- the first half -------------------------------------------------------------------------------------

    def perturb_groups(self) -> list[PerturbGroup]:
        """Return each parameter group's numbers for norm and perturb.

        Raises:
            TypeError, ValueError: one of SAM's options in a group is of a wrong type or out of range.
        """
        found = []
        mask_prob = self.optimizer.mask_prob
        if not 0 < mask_prob <= 1:
            raise ValueError(f"mask_prob must be above 0 and at most 1, not {mask_prob!r}")
        if mask_prob < 1 and self.tensor_norms is not None:
            raise ValueError(
                f"mask_prob={mask_prob:g} perturbs a part of each tensor, by the global norm: "
                'leave norm="global", with T_w and lengths that do not depend on the tensor, or set mask_prob to 1'
            )
        for k, group in enumerate(self.optimizer.param_groups):
            try:
                rho, eta = float(group["rho"]), float(group["eta"])
            except (TypeError, ValueError, RuntimeError):
                check_group(group, k)
                raise
            if not (0 <= rho < math.inf and 0 <= eta < math.inf):
                check_group(group, k)
            found.append(PerturbGroup(rho, bool(group["adaptive"]), eta, mask_prob))
        return found

    def check_preconditioned(self, groups: list[PerturbGroup] | None = None) -> tuple[list[Any], list[PerturbGroup]]:
        """Return Adam's numbers of each group, and the groups of a perturbation with T_w from its second moments.

        Raises:
            ValueError: a group's options do not fit.
        """
        adam, _ = self.base.numbers(self.optimizer.param_groups)
        return adam, SecondMoments.groups(self.perturb_groups() if groups is None else groups, adam)

    def any_perturbed(self, groups: Sequence[PerturbGroup]) -> bool:
        """Return True if a group has rho above 0 and takes part in the perturbation."""
        for numbers, group in zip(groups, self.optimizer.param_groups, strict=True):
            if numbers.rho > 0 and group["perturb"]:
                return True
        return False

    def decide(self, groups: list[PerturbGroup] | None = None) -> bool:
        """Return True if this step perturbs: asked once per step, then remembered."""
        if self.decision is None:
            groups = self.perturb_groups() if groups is None else groups
            self.decision = self.any_perturbed(groups) and (not self._has_hooks or self.wants_perturbation())
        return self.decision

    def wants_perturbation(self) -> bool:
        """Ask schedule and method whether the coming step perturbs."""
        return not self._has_hooks or self.context._ask()

    def perturb(self, *, keep_skip: bool = False) -> bool:
        """Save the parameters and add e = rho * g / (||g|| + eps), if this step perturbs; return True if it does.

        Args:
            keep_skip: True if an earlier perturbation of this step may have set the skip flag.
        """
        groups = self.perturb_groups()
        if not self.decide(groups):
            self._finish_empty_norm(ascent=True)
            self.perturbed = self.current_plan().none_perturbed
            return False
        plan, snapshot = self.snapshot()
        if self.pass_check is not None:
            self.pass_check.first_pass(snapshot)
        optimizer, status = self.optimizer, self.status
        flags = tuple(map(_PERTURB, optimizer.param_groups))
        if self.second_moments is None:
            calls = plan.perturb_calls(snapshot, flags, optimizer.state)
        else:
            adam, groups = self.check_preconditioned(groups)
            calls = self.second_moments.calls(plan, snapshot, flags, adam, optimizer.state)
        if plan.has_twins:
            groups = with_twins(groups)
        plan.attach(calls, snapshot)
        try:
            if self._has_hooks:
                self.context._run_ascent(plan, snapshot)
            self.norm(plan, calls, snapshot, groups, status, keep_skip)
            if self._has_hooks:
                groups = self.context._run_radius(groups)
            self.write_perturbation(calls, groups, status)
        except BaseException:
            self.undo()
            if self._has_hooks:
                self.context._abandon()
            raise
        finally:
            plan.detach(calls)
        if optimizer.mask_prob < 1 or self.settings.precision.stochastic_rounding or plan.masters.any_needed:
            self.after_write(perturbed=True)
        return True

    def write_perturbation(self, calls: list[KernelCall], groups: list[PerturbGroup], status: Status) -> None:
        """Perturb the parameters, so that `undo` restores what an exception has left of it."""
        self.marks = marks = status.marks
        marks[PERTURBED] = 0
        self.perturbed = calls
        for k, call in enumerate(calls):
            call.backend.perturb(call.table, groups, status)
            marks[PERTURBED] = k + 1

    def _finish_empty_norm(self, *, ascent: bool) -> None:
        """Count the last step if it was skipped, and start a step in which no norm is taken."""
        status = self.status
        status.values[SUM] = 0
        self.backend.finish_norm(status, ascent=ascent, keep_skip=False, eps=self.settings.eps)

    def has_new_grads(self) -> bool:
        """Return True if a backward pass has computed gradients since the last update, for step(closure)."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._watch is not None and self._watch.is_for(params):
            new = self._watch.ran
        else:
            self._watch, new = BackwardWatch(params), not self.grads_used
        return new and any_grads(params)

    def perturb_flags(self) -> tuple[bool, ...]:
        """Return for each group True if it is perturbed and counts in the norm."""
        return tuple(map(_PERTURB, self.optimizer.param_groups))

    def norm(
        self,
        plan: Plan,
        calls: list[KernelCall],
        snapshot: GradSnapshot,
        groups: list[PerturbGroup] | None,
        status: Status,
        keep_skip: bool,
    ) -> None:
        """Take the norm over all tables and, if parameters are sharded, over all processes.

        Args:
            groups: for the norm of T_w g that perturbs; None for that of the update's gradients.
        """
        eps = self.settings.eps
        if self.tensor_norms is not None and groups is not None:
            self.tensor_norms.take(
                self.backend, plan, calls, snapshot, groups, status, keep_skip=keep_skip, eps=eps
            )
        elif plan.sharding is not None:
            self._sharded_norm(plan, calls, snapshot, groups, status, keep_skip)
        elif len(calls) == 1:
            calls[0].backend.norm((calls[0].table,), groups, status, keep_skip=keep_skip, eps=eps)
        elif calls and all(call.backend is calls[0].backend for call in calls):
            calls[0].backend.norm([call.table for call in calls], groups, status, keep_skip=keep_skip, eps=eps)
        else:
            status.values[SUM] = 0
            for call in calls:
                call.backend.accumulate_norm(call.table, groups, status)
            self.backend.finish_norm(status, ascent=groups is not None, keep_skip=keep_skip, eps=eps)

    def _sharded_norm(
        self,
        plan: Plan,
        calls: list[KernelCall],
        snapshot: GradSnapshot,
        groups: list[PerturbGroup] | None,
        status: Status,
        keep_skip: bool,
    ) -> None:
        assert plan.sharding is not None
        if not keep_skip:
            count_skipped_step(status.values)
            status.values[SKIP] = 0
        total = status.values.new_zeros(())
        for call in calls:
            status.values[SUM] = 0
            call.backend.accumulate_norm(call.table, groups, status)
            total += status.sum_of_squares * call.fraction
        status.values[SUM] = total
        plan.sharding.reduce_norm(status.values, snapshot.pattern())
        self.backend.finish_norm(status, ascent=groups is not None, keep_skip=True, eps=self.settings.eps)

    # ---- the second half ------------------------------------------------------------------------------------

    def update(self, *, divisor: int = 1) -> None:
        """Undo the perturbation, if there is one, and update with the gradients as they are.

        Args:
            divisor: divide the gradients by this, the number of micro-batches that they are the sum of.
        """
        if self.unfinished is not None:
            self.finish_update()
        optimizer, status = self.optimizer, self.status
        self.stage = 0
        status.marks[UPDATED] = 0
        perturbed = self.perturbed
        if perturbed and self.marks[PERTURBED] < len(perturbed):
            perturbed = self.written_calls()
        try:
            self.perturb_groups()  # its checks
            groups, names = self.base.numbers(optimizer.param_groups)
            plan, snapshot = self.snapshot()
            if plan.has_twins:
                groups = groups * 2
            if perturbed is None and not self.plain_step_warning_off:
                self._warn_of_plain_step()
            undo = self.perturbed if self.perturbed else plan.none_perturbed  # a new plan has calls of its own
            update = plan.update_plan(snapshot, undo, names, optimizer.state)
            scale: Tensor | None = getattr(optimizer, "grad_scale", None)
            if scale is None and self.noted_scale is not None:
                scale = self._scale_after_unscaling(perturbed)
            elif perturbed and self.ascent_scale is None:
                self.ascent_scale = scale
            self.grad_scale = scale if divisor == 1 else self._divided(scale, divisor)
            if perturbed and self.pass_check is not None:
                self._check_passes(snapshot, scale, divisor)
            self.changed_update = self.keeps_skip = False
            if self._has_hooks:
                self.context._run_descent(plan, snapshot)
            plan.attach(update.calls, snapshot)
            try:
                self._check_finite(plan, update.calls, snapshot, keep_skip=perturbed is not None)
                self.unfinished = plan, update, snapshot, groups
                self.base.step(update, snapshot, groups, status, self.grad_scale, self.settings.max_norm)
                self.scaled_grads = self.base.rule is None and not self.known_skip()
            finally:
                plan.detach(update.calls)
            if update.new and not self.known_skip():
                update.commit(optimizer.state)
            self.perturbed = None
            self.stage = 1
            if optimizer.mask_prob < 1 or self.settings.precision.stochastic_rounding or plan.masters.any_needed:
                self.after_write(perturbed=False)
            self.grads_used = True
            if self._watch is not None:
                self._watch.ran = False
            if self._has_hooks:
                self.context._run_updated()
                self.stage = 2
                self.context._end()
            self.decision, self.grads_unscaled = None, False
            self.steps_ended += 1
            self.unfinished = None
        except BaseException:
            self.finish_update()
            raise
        self.updates += 1
        if self.updates == self.next_look:
            self.next_look = look(self)

    def finish_update(self) -> None:
        """Complete an update that an exception has ended after it had written something, or undo the perturbation.

        A further interrupt does not end this: it goes on. What it still cannot complete stays in `unfinished`, and the
        next call of the optimizer completes it.
        """
        for k in range(_ATTEMPTS):
            try:
                self._finish_update()
                return
            except Exception:
                if self.stage:  # the `updated` hook itself fails, and would again
                    self.context._end()
                    self.unfinished = None
                raise
            except BaseException:
                if k == _ATTEMPTS - 1:
                    raise

    def _finish_update(self) -> None:
        unfinished = self.unfinished
        if unfinished is not None:
            _, update, *_ = unfinished
            if self.stage or self.status.marks[UPDATED] or any(call.table.pending for call in update.calls):
                self._complete(*unfinished)
                self.unfinished = None
                return
            self.unfinished = None
        self.optimizer.restore()

    def _check_passes(self, snapshot: GradSnapshot, scale: Tensor | None, divisor: int) -> None:
        assert self.pass_check is not None
        self.pass_check.second_pass(snapshot, scale, divisor)
        if self.pass_check.done:
            self.pass_check = None

    def _scale_after_unscaling(self, perturbed: list[KernelCall] | None) -> Tensor | None:
        """Return the scale of the update's gradients after unscale_(): None if these are unscaled."""
        if self.grads_unscaled:
            if perturbed and self.ascent_scale is None:
                self.ascent_scale = self.noted_scale
            return None
        return self.noted_scale if getattr(self.optimizer, "found_inf", None) is not None else None

    @torch.no_grad()
    def _complete(self, plan: Plan, update: UpdatePlan, snapshot: GradSnapshot, groups: list[Any]) -> None:
        """Complete an update that has written parameters or state. Called again, it goes on where it was ended."""
        status = self.status
        if self.stage == 0:
            if self.base.rule is not None:
                plan.attach(update.calls, snapshot)
                try:
                    self.base.step(update, snapshot, groups, status, self.grad_scale, self.settings.max_norm)
                finally:
                    plan.detach(update.calls)
                for call in update.calls:
                    call.table.pending = []
                if update.new and not self.known_skip():
                    update.commit(self.optimizer.state)
            plan.masters.record_versions()
            self.perturbed = None
            self.steps_ended += 1
            self.stage = 1
        self.decision, self.grads_unscaled = None, False
        if self._has_hooks and self.stage < 2:
            self.context._run_updated()
            self.stage = 2
        self.context._end()

    def _divided(self, scale: Tensor | None, divisor: int) -> Tensor:
        """Return what the gradients of the update are to be divided by: GradScaler's scale times `divisor`."""
        values = self.status.values
        count = torch.full((), float(divisor), dtype=values.dtype, device=values.device)
        return count if scale is None else count * scale.to(count)

    def _check_finite(
        self, plan: Plan, calls: list[KernelCall], snapshot: GradSnapshot, *, keep_skip: bool
    ) -> None:
        """Set the skip flag if the gradients of the update are not finite; keep_skip: or if the first ones were not."""
        status, settings = self.status, self.settings
        keep_skip = (keep_skip and self.optimizer.skips_with_ascent) or self.keeps_skip
        found_inf = getattr(self.optimizer, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler's sum over no gradients at all is a plain 0
            found_inf = None
        if found_inf is not None:  # GradScaler has checked every gradient; never negative, and not 0 skips
            skip = status.values[SKIP : SKIP + 1]
            if not keep_skip:
                self._finish_empty_norm(ascent=False)
            skip.add_(found_inf.reshape(1).to(skip, non_blocking=True))
            keep_skip = True
        # GradScaler has checked the gradients that unscale_() was called for, which may be the first ones.
        scaled = getattr(self.optimizer, "grad_scale", 0) is not None
        others = found_inf is not None and self.grad_scale is not None and not scaled
        unchecked = found_inf is None or self.changed_update or self.optimizer.combines_grads
        self.took_update_norm = settings.max_norm < math.inf or (settings.check_update and unchecked) or others
        if self.took_update_norm:
            self.norm(plan, calls, snapshot, None, status, keep_skip)
        elif not keep_skip:
            status.values[SKIP] = 0
        elif plan.sharding is not None and found_inf is not None:
            status.values[SUM] = 0
            plan.sharding.reduce_norm(status.values, snapshot.pattern())
        if self.skip_process_group is not None:
            skip = status.values[SKIP : SKIP + 1]
            torch.distributed.all_reduce(skip, torch.distributed.ReduceOp.MAX, group=self.skip_process_group)

    def _warn_of_plain_step(self) -> None:
        """Warn once if the first update of all is a plain step.

        A learning rate of 0 gives no warning: frameworks take such a step only to create the state.
        """
        rates = [group.get("lr", 1.0) for group in self.optimizer.param_groups]
        moves = any((isinstance(r, Tensor) and r.device.type != "cpu") or float(r) != 0 for r in rates)
        if moves and self.any_perturbed(self.perturb_groups()):
            self.plain_step_warning_off = True
            warn_of_plain_step(type(self.optimizer).__name__, self.base.cls.__name__)

    # ---- undoing --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the perturbation, bit for bit, without an update. The step is decided again after that."""
        self.grads_used = True
        if self._watch is not None:
            self._watch.ran = False
        self.decision, self.suspended, self.in_closure = None, False, False
        self.steps_ended += 1
        if self.unfinished is not None:
            self.finish_update()
        if self.perturbed is not None:
            self.undo()
        self.context._end()

    @torch.no_grad()
    def undo(self) -> None:
        """Undo the perturbation and keep everything else of the step: its decision and its kept gradients."""
        if self.perturbed is None:
            return
        plan = self.current_plan()
        calls = self.written_calls()
        plan.sync_masters(self.optimizer.state, calls)
        for call in calls:
            call.backend.restore(call.table)
        self.perturbed = None
        plan.masters.record_versions()

    def written_calls(self) -> list[KernelCall]:
        """Return the calls that have perturbed parameters, and forget those that an exception has prevented."""
        calls = self.perturbed or []
        if self.marks[PERTURBED] < len(calls):
            self.perturbed = calls = calls[: int(self.marks[PERTURBED])]
        return calls

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Restore the clean parameters inside `with`, and the perturbed ones, bit for bit, after it."""
        if self.perturbed is None:
            yield
            return
        plan = self.current_plan()
        calls = self.written_calls()
        copies = [[p.detach().clone() for p in call.table.params] for call in calls]
        with torch.no_grad():
            for call in calls:
                call.backend.restore(call.table)
        # Between these lines an exception leaves clean parameters that restore() restores once more.
        self.suspended = True
        self.perturbed = None
        try:
            yield
        finally:
            if self.suspended:  # else restore() has ended the step
                self.perturbed = calls
                self.suspended = False
                with torch.no_grad():
                    plan.sync_masters(self.optimizer.state, calls)
                    for call, values in zip(calls, copies, strict=True):
                        torch._foreach_copy_(call.table.params, values)
                plan.masters.record_versions()

    @property
    def displacement(self) -> Any:
        """The method's displacement.Displacement, which displaces the parameters between steps."""
        if self._displacement is None:
            self._displacement = self.optimizer.make_displacement(self)
        return self._displacement

    # ---- plan and gradients ---------------------------------------------------------------------------------

    def device(self) -> torch.device:
        """Return the parameters' device."""
        return device_of(self.optimizer.param_groups)

    def new_plan(self) -> Plan:
        """Return a plan for the parameters as they are now."""
        return Plan(
            self.optimizer.param_groups,
            self.backend,
            self.settings.precision,
            self.base.rule,
            self._is_scaled,
        )

    def current_plan(self) -> Plan:
        """Return the plan, made again if parameters were added, replaced or moved."""
        plan = self.plan
        if not plan.matches(self.optimizer.param_groups):
            device = self.device()
            if device != self.status.device:
                self.backend = backends.choose(self.settings.backend, device)
                self.save_rng_offset()
                self.status = Status(device)
                self._load_rng_offset()
            new = self.new_plan()
            new.inherit(plan)
            if self.perturbed is not None:
                taken = new.take_over(plan, self.written_calls())
                self.marks[PERTURBED] = math.inf  # all of the old calls, and of the new ones
                self.perturbed = taken
            self.context._replanned(plan, new)
            self.plan = plan = new
        return plan

    def snapshot(self) -> tuple[Plan, GradSnapshot]:
        """Return the gradients as they are now, and the plan for them."""
        if self.optimizer.state is not self._state:  # replaced by a load that an exception has ended, or by hand
            self.forget_state()
        plan = self.plan
        snapshot = plan.snapshot(self.optimizer.param_groups)
        if snapshot is None:
            plan = self.current_plan()
            snapshot = plan.snapshot(self.optimizer.param_groups)
            assert snapshot is not None  # the plan was made from these groups
        if not self.had_gradients:
            self.had_gradients = any(snapshot.codes) or plan.sharding is not None
            if not self.had_gradients and is_distributed():
                raise RuntimeError(
                    "none of the optimizer's parameters has ever had a gradient: if the model was sharded or replaced "
                    "(fully_shard, parallelize_module, .to()) after the optimizer was built, build the optimizer over "
                    "the model's parameters after that; else run backward() first"
                )
        return plan, snapshot

    def forget_state(self) -> None:
        """Drop what depends on optimizer state and counters, which have been replaced."""
        self._state = self.optimizer.state
        self.loss_check = None  # loaded weights are not a fresh network's
        self.plan.forget_state()
        self.status = Status(self.device())
        self._load_rng_offset()
        self.decision = None
        self.steps_ended += 1

    # ---- numbers that stay on the device --------------------------------------------------------------------

    def known_skip(self) -> bool:
        """Return True if the skip flag is set and can be read without waiting, as on the CPU."""
        host = self.status.host
        return host is not None and host[SKIP] != 0

    def update_norm(self) -> Tensor:
        """Return the norm of the last update's gradients without the loss scale; NaN if no pass took it."""
        norm = self.status.update_norm.clone()
        if self.grad_scale is not None:
            norm = norm / self.grad_scale.to(norm)
        return norm if self.took_update_norm else torch.full_like(norm, math.nan)

    def clip_factor(self) -> Tensor | float:
        """Return what the last update multiplied its gradients by to clip them, loss scale apart."""
        max_norm = self.settings.max_norm
        if max_norm == math.inf:
            return 1.0
        norm = self.status.values[UPDATE_NORM]
        if self.grad_scale is not None:
            norm = norm / self.grad_scale.to(norm)
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)

    # ---- random numbers -------------------------------------------------------------------------------------

    def after_write(self, *, perturbed: bool) -> None:
        """Note that a perturbation or an update has written parameters and, if one draws random numbers, count that."""
        if self.optimizer.mask_prob < 1 or self.settings.precision.stochastic_rounding:
            self._perturb_drew = perturbed
            self.status.rng_offset.add_(1).remainder_(2**24)  # fp32 counts no further
        if self.plan.masters.any_needed:
            self.plan.masters.record_versions()

    def rewind_rng(self) -> None:
        """Make the next primitive draw the numbers that the last one drew."""
        self.status.rng_offset.sub_(1).remainder_(2**24)

    def save_rng_offset(self) -> None:
        """Write the offset into the parameter groups, from which a state_dict takes it."""
        for group in self.optimizer.param_groups:
            if "rng_offset" in group:
                # Saved between the passes of a step, the step starts over, and draws the same numbers then.
                started = self.suspended and self._perturb_drew
                group["rng_offset"] = (int(self.status.rng_offset) - started) % 2**24

    def _load_rng_offset(self) -> None:
        groups = self.optimizer.param_groups
        if groups and "rng_offset" in groups[0]:
            self.status.values[RNG_OFFSET] = groups[0]["rng_offset"]

    # ---- checks ---------------------------------------------------------------------------------------------

    def check_decay_in_ascent(self, groups: Sequence[dict[str, Any]], first: int = 0) -> None:
        """Refuse decay_in_ascent for groups, the first one of that number, whose weight decay is no L2 term."""
        if not self.settings.decay_in_ascent:
            return
        name = self.base.cls.__name__
        for k, group in enumerate(groups, first):
            if "weight_decay" not in group or group.get("decoupled_weight_decay") or self.base.rule is LION:
                raise ValueError(
                    f"decay_in_ascent=True adds weight_decay * w to the ascent gradient, but {name} has no weight "
                    "decay that is a part of the gradient: leave it out, or use SGD or Adam"
                )
            if group.get("maximize"):
                raise ValueError(
                    f"decay_in_ascent=True does not work with maximize=True in group {k}: minimize the negative loss"
                )

    def _check_precision(self) -> None:
        """Check the options for bf16 and fp16 parameters against the parameters."""
        precision, groups = self.settings.precision, self.optimizer.param_groups
        low = [p for group in groups for p in group["params"] if p.dtype in LOW_PRECISION]
        for name in ("master_weights", "stochastic_rounding"):
            if getattr(precision, name) and not low:
                raise ValueError(f"{name}=True is for bf16 and fp16 weights, and there are none: leave it out")
            if getattr(precision, name) and isinstance(self.base, WrappedBase):
                raise ValueError(
                    f"{name} needs a fused base optimizer ({fused_names()}), not {self.base.cls.__name__}"
                )
        if low and not (precision.master_weights or precision.stochastic_rounding):
            warn_of_rounding(groups)


def with_twins(groups: list[PerturbGroup]) -> list[PerturbGroup]:
    """Return the groups and, after them, a twin of each that is not adaptive, for unscaled parameters."""
    return groups + [group._replace(adaptive=False) for group in groups]
