"""The interface of a method of the SAM family to a step: `Step`, and vectors over all parameters, `TensorVector`.

A method is a subclass of SAM that overrides hooks. Each gets the step and touches nothing that begins with an
underscore; docs/writing-a-method.md teaches it.

    class StableSAM(SAM):                                     # d = (||g|| / ||g_s||) g_s   (arXiv 2401.07250)
        def descent(self, step):
            if step.perturbed:
                step.grad.scale_(step.ascent_norm / step.grad.norm())

Numbers are 0-dim tensors on the device or Python numbers; nothing here makes the host wait for the device. Gradients
count without the loss scale of a GradScaler, and norms and dot products are global under sharding.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backends.contract import SKIP, UPDATED, XX, PerturbGroup, count_skipped_step
from .engine import pairs
from .engine.calls import GradSnapshot
from .engine.extra_state import ExtraState
from .engine.layout import owned
from .engine.options import REQUIRED, Option, is_number, option
from .engine.plan import Plan
from .engine.sharding import like
from .engine.stepper import Stepper
from .engine.vectors import Combination, Number, Products, TensorVector, is_one, masked, over, terms_of, times

__all__ = [
    "REQUIRED", "Combination", "GroupRho", "Number", "Option", "Products", "Schedule", "Step", "TensorVector", "option",
]  # fmt: skip


class GroupRho:
    """Each parameter group's rho times a factor, as `radius` may return it: `step.rho * step.ascent_norm`."""

    def __init__(self, factor: Number = 1.0) -> None:
        self.factor = factor

    def __mul__(self, a: Number) -> GroupRho:
        return GroupRho(times(self.factor, a))

    __rmul__ = __mul__

    def __truediv__(self, a: Number) -> GroupRho:
        return GroupRho(over(self.factor, a))


class Step:
    """One step of SAM, as every hook gets it. Do not use it or its vectors after the step.

    Attributes:
        groups: the optimizer's param_groups: dicts with rho, lr and the other options.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._optimizer = stepper.optimizer
        self._extra = ExtraState()
        self._phase = ""
        self._snapshot: GradSnapshot | None = None
        self._vectors: dict[str, TensorVector] = {}
        self._kept: list[Tensor | None] | None = None  # the ascent gradients, taken from the parameters
        self._needed_scale = False  # True if the ascent used the absolute size of a gradient without knowing its scale
        self._counter_names = tuple(stepper.optimizer.group_state())
        self._counters: list[dict[str, Any]] | None = None  # the groups' before `updated`, while that runs
        self._scheduled = False
        self._was_perturbed = False
        self._wrote_weights = False
        self._update_scale: Tensor | None = None  # GradScaler's, of the update's gradients

    # ---- what hooks read ------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's param_groups."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    @property
    def grad(self) -> TensorVector:
        """The gradients of this pass: of the first one in `ascent` and `radius`, of the second one afterwards.

        Changing it in `ascent` changes the direction of the perturbation, changing it in `descent` the update.
        """
        return self._vector("grad")

    @property
    def ascent_grad(self) -> TensorVector:
        """The gradients of the first pass as `ascent` left them. The class must set `keeps_ascent_grad = True`.

        Raises:
            RuntimeError: they are not kept, or this step has not perturbed.
        """
        return self._vector("ascent_grad")

    @property
    def weights(self) -> TensorVector:
        """The parameters (their fp32 masters if there are any). A hook may write to them in `updated` only."""
        return self._vector("weights")

    def state(self, name: str) -> TensorVector:
        """Return a vector that the optimizer's state keeps under that name: fp32, or fp64 for fp64 parameters.

        It counts as zero until the `updated` hook writes to it. Only `updated` may write to it, and a skipped step
        leaves it as it is. A state_dict carries it.

        Raises:
            ValueError: the base optimizer has state of that name.
        """
        rule = self._stepper.base.rule
        if rule is not None and name in {column.name for column in rule.columns}:
            raise ValueError(
                f"{self._where()}: step.state({name!r}) is the base optimizer's own state; choose another name"
            )
        return self._vector("state", name)

    @property
    def ascent_norm(self) -> Tensor:
        """||T_w g||, the global norm of the gradient that perturbs: 0-dim. Known from `radius` on."""
        if self._phase == "ascent":
            raise RuntimeError(f"{self._where()}: step.ascent_norm is not known before `radius`; use step.grad.norm()")
        return over(self._stepper.status.ascent_norm.clone(), self._scale_of_norms())

    def _scale_of_norms(self) -> Number:
        """Return the scale of the norm of the ascent, and note that it was needed if it is not known."""
        scale = self._ascent_scale if self._phase == "radius" else self._scale_of_ascent()
        if scale is None:
            self._needed_scale = True
            return 1.0
        return scale

    @property
    def ascent_norms(self) -> Tensor:
        """The norms of T_w g that divide e, one per parameter, in the order of the groups. Known from `radius` on.

        With norm="group" the parameters of a group share one number, with norm="global" all do. A parameter has 0 if it
        has no gradient or is not perturbed.

        Raises:
            RuntimeError: before `radius`; with norm="global", unless the class sets `reads_weight_norms = True`.
        """
        return over(self._per_parameter("ascent_norms", "norms"), self._scale_of_norms())

    @property
    def weight_norms(self) -> Tensor:
        """||w||, over what the norm is taken over, one per parameter. The class must set `reads_weight_norms = True`.

        Otherwise as `ascent_norms`.
        """
        if not self._optimizer.reads_weight_norms:
            raise RuntimeError(
                f"{self._where()}: step.weight_norms are taken if the class sets reads_weight_norms = True"
            )
        return self._per_parameter("weight_norms", "weight_norms").clone()

    def _per_parameter(self, name: str, attribute: str) -> Tensor:
        taken = self._stepper.tensor_norms
        if taken is None:
            raise RuntimeError(
                f'{self._where()}: step.{name} needs norm="tensor" or norm="group", or a class with '
                "reads_weight_norms = True"
            )
        numbers: Tensor | None = getattr(taken, attribute)
        if numbers is None or self._phase == "ascent":
            raise RuntimeError(f"{self._where()}: step.{name} is not known before `radius`")
        return numbers

    @property
    def rho(self) -> GroupRho:
        """Each group's rho, for `radius`: multiply or divide it by a number, and return it."""
        return GroupRho()

    @property
    def perturbed(self) -> bool:
        """True if this step has perturbed the parameters, so that `grad` is a gradient at w + e."""
        return self._was_perturbed

    @property
    def scheduled(self) -> bool:
        """True if the schedule lets the method act in this step, and a group has rho above 0."""
        self._stepper.decide()
        return self._scheduled and self._stepper.any_perturbed(self._stepper.perturb_groups())

    @property
    def skipped(self) -> Tensor:
        """True if a gradient was not finite, so that the step changes nothing: 0-dim bool on the device."""
        return self._stepper.status.values[SKIP] != 0

    @property
    def grad_scale(self) -> Number | None:
        """What the gradients of this pass are multiplied by; None if nothing is known of a scale."""
        return self._ascent_scale if self._phase in ("ascent", "radius") else self._update_scale

    @property
    def _ascent_scale(self) -> Number | None:
        """The scale of the first gradients if the caller has set it, else None."""
        scale: Number | None = self._optimizer.ascent_grad_scale
        return scale.to(self._stepper.status.values) if isinstance(scale, Tensor) else scale

    @property
    def clip_factor(self) -> Number:
        """What max_norm multiplies the update's gradient by: 1 without clipping. Known in `updated`."""
        return self._stepper.clip_factor()

    # ---- what hooks set -------------------------------------------------------------------------------------

    @property
    def update_grad(self) -> TensorVector | Combination:
        """The gradient that the base optimizer gets. Set it in `descent`, to a sum of grad and one other vector.

        A parameter that has a gradient in the second pass only is updated with it as it is.
        """
        return self._vectors.get("update", self.grad)

    @update_grad.setter
    def update_grad(self, value: TensorVector | Combination) -> None:
        if self._phase != "descent":
            raise RuntimeError(f"{self._where()}: step.update_grad is set in the hook `descent`, before the update")
        target, terms = self._vectors.get("update", self.grad), terms_of(value, "step.update_grad")
        self._stepper.changed_update = True
        ascent = self._vectors.get("ascent_grad")
        if len(terms) == 1 and terms[0][1] is ascent and is_one(terms[0][0]) and target is self.grad:
            self._use_ascent_grad(ascent)
            return
        a = next((c for c, x in terms if x is target), None)
        others = [(c, x) for c, x in terms if x is not target]
        if a is None or len(others) != 1:
            target.copy_(value)  # of one vector, or of two others
            return
        b, other = others[0]
        pairs.axpby(self._plan, target._tensors, other._tensors, target._tensors, a, times(b, target._ratio(other)))
        target._note_write()

    def require_finite(self, vector: TensorVector) -> None:
        """Skip the step if an element of the vector is not finite. Use it for vectors outside the update's gradient."""
        if self._phase != "descent":
            raise RuntimeError(f"{self._where()}: step.require_finite() is for the hook `descent`, before the update")
        self._skip_unless(pairs.dot(self._plan, vector._tensors, vector._tensors)[XX].isfinite())

    # ---- what the stepper calls -----------------------------------------------------------------------------

    def _run_ascent(self, plan: Plan, snapshot: GradSnapshot) -> None:
        """Run the method's ascent hook, and take the gradients from the parameters if the class keeps them."""
        self._vectors.clear()
        self._snapshot, self._kept = snapshot, None
        with self._in("ascent"):
            if self._stepper.settings.decay_in_ascent:
                for k, group in enumerate(self.groups):
                    if group["perturb"] and group["weight_decay"] != 0:
                        self.grad.group(k).axpby_(1.0, group["weight_decay"], self.weights.group(k))
            _check_none(self._optimizer.ascent(self), self)
        if self._optimizer.keeps_ascent_grad:
            self._kept = [None if g is None else owned(g) for g in snapshot.grads]
            for p in plan.params:
                p.grad = None

    def _run_radius(self, groups: list[PerturbGroup]) -> list[PerturbGroup]:
        """Run the method's radius hook; return the groups with the lengths that it gave."""
        with self._in("radius"):
            length = self._optimizer.radius(self)
        if length is None:
            return groups
        relative = isinstance(length, GroupRho)
        factor: Any = length.factor if isinstance(length, GroupRho) else length
        taken = self._stepper.tensor_norms
        if taken is not None and isinstance(factor, Tensor) and factor.shape == (len(self._plan.params),):
            taken.multiply(factor)
            return groups if relative else [g._replace(rho=1.0 if g.rho > 0 else 0.0) for g in groups]
        if not is_number(factor):
            raise TypeError(
                f"{self._where('radius')} must return the length of e: a number, a 0-dim tensor, one number per "
                f'parameter with norm="tensor" or "group", step.rho times one of them, or None for each group\'s rho; '
                f"not {length!r}"
            )
        if not isinstance(factor, Tensor) and not 0 <= factor < math.inf:
            raise ValueError(f"{self._where('radius')} must return a finite length of 0 or more, not {length!r}")
        # The kernels multiply a group's rho by the inverse norm.
        if isinstance(factor, Tensor):
            self._stepper.status.inverse_norm.mul_(factor.reshape(()))
            return groups if relative else [g._replace(rho=1.0 if g.rho > 0 else 0.0) for g in groups]
        if relative:
            return [g._replace(rho=g.rho * float(factor)) for g in groups]
        return [g._replace(rho=float(factor) if g.rho > 0 else 0.0) for g in groups]

    def _run_descent(self, plan: Plan, snapshot: GradSnapshot) -> None:
        """Run the method's descent hook."""
        self._snapshot = snapshot
        self._vectors.clear()
        stepper = self._stepper
        self._was_perturbed = stepper.perturbed is not None and bool(stepper.perturbed or stepper.decision)
        scale = self._stepper.grad_scale
        self._update_scale = None if scale is None else scale.to(self._stepper.status.values)
        optimizer = self._optimizer
        scaled = scale is not None or getattr(optimizer, "found_inf", None) is not None
        unscaled_between = scaled and scale is None and self._kept is not None and self._ascent_scale is None
        if (self._needed_scale and scaled) or (unscaled_between and optimizer.needs_grad_scale):
            raise RuntimeError(
                f"{type(self._optimizer).__name__} needs the loss scale of its first gradients, because it compares "
                "gradients of different steps"
                + (", or because scaler.unscale_() has unscaled the second ones only" if unscaled_between else "")
                + ": call first_step(grad_scale=scaler.get_scale()), or set optimizer.ascent_grad_scale, in each step"
            )
        with self._in("descent"):
            _check_none(self._optimizer.descent(self), self)

    def _run_updated(self) -> None:
        """Count the step and run the method's updated hook.

        Called again after an exception has ended it, it starts over and leaves out the writes that it has made.
        """
        if self._counters is None:
            self._stepper.status.marks[UPDATED] = 0
            self._stepper.status.pending = None
            self._counters = [{name: group[name] for name in self._counter_names} for group in self.groups]
        else:
            for group, values in zip(self.groups, self._counters, strict=True):
                group.update(values)
            self._vectors = {key: vector for key, vector in self._vectors.items() if vector._role != "state"}
        if self._stepper.schedule is not None:
            self._stepper.schedule.stepped(self)
        self._plan.writes = 0
        self._vectors.pop("weights", None)  # the update has moved them
        grad = self._vectors.get("grad")
        if self._stepper.scaled_grads and (grad is None or grad._tensors is self._snapshot_grads()):
            # A base optimizer with a step of its own got its gradients in p.grad, unscaled and clipped.
            self._vectors["grad"] = TensorVector(self, self._snapshot_grads(), 1.0, "grad")
        if self._stepper.scaled_grads and "update" in self._vectors:  # these were the first gradients
            assert self._kept is not None
            self._vectors["ascent_grad"] = TensorVector(self, self._kept, 1.0, "ascent_grad")
        try:
            with self._in("updated"):
                _check_none(self._optimizer.updated(self), self)
        finally:
            if self._wrote_weights:
                self._wrote_weights = False
                with torch.no_grad():
                    self._plan.masters.write_params()
                self._plan.masters.record_versions()

    def _abandon(self) -> None:
        """Give the first gradients back to the parameters, because the perturbation failed."""
        if self._kept is not None:
            for p, g in zip(self._plan.params, self._kept, strict=True):
                p.grad = None if g is None else like(g, p)
        self._end()

    def _ask(self) -> bool:
        """Ask the schedule and the method whether this step perturbs."""
        schedule = self._stepper.schedule
        if self._phase == "wants_perturbation" and _calls_itself():
            raise RuntimeError(
                f"{self._where()} asks whether this step perturbs, which it is to decide: it may not read "
                "step.scheduled or needs_second_pass"
            )
        now, self._snapshot, self._vectors = (self._snapshot, self._vectors), None, {}
        try:
            with self._in("wants_perturbation"):
                self._scheduled = schedule is None or bool(schedule.due(self))
                return self._scheduled and bool(self._optimizer.wants_perturbation(self))
        finally:
            self._snapshot, self._vectors = now

    def _replanned(self, old: Plan, new: Plan) -> None:
        """Sort the ascent gradients for the parameters of a new plan."""
        self._vectors.clear()
        if self._kept is not None:
            by_param = dict(zip(old.params, self._kept, strict=True))
            self._kept = [by_param.get(p) for p in new.params]

    def _end(self) -> None:
        """Let go of the gradients, and of what is known of one step only."""
        self._snapshot = self._kept = self._counters = None
        self._extra.begun_now.clear()
        self._vectors.clear()
        self._needed_scale = self._scheduled = self._was_perturbed = False
        self._update_scale = None

    def _forget(self) -> None:
        """Forget everything, because the state was replaced."""
        self._end()
        self._extra.forget()

    def _settle(self) -> None:
        """Take state that a skipped update began out of the optimizer's state, before it is saved."""
        self._extra.settle()

    # ---- within ---------------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        return self._stepper.plan

    def _where(self, hook: str = "") -> str:
        return f"{type(self._optimizer).__name__}.{hook or self._phase or 'step'}()"

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            yield
        finally:
            self._phase = before
            torch._C._set_grad_enabled(grad)

    def _scale_of_ascent(self) -> Number | None:
        """Return the scale of the first gradients: as it was told, else GradScaler's, which has not changed since."""
        if self._ascent_scale is not None:
            return self._ascent_scale
        return 1.0 if self._update_scale is None else self._update_scale

    def _snapshot_grads(self) -> list[Tensor | None]:
        if self._snapshot is None:
            self._snapshot = self._stepper.snapshot()[1]
        return self._snapshot.grads

    def _vector(self, role: str, name: str = "") -> TensorVector:
        found = self._vectors.get(role + name)
        if found is None:
            found = self._vectors[role + name] = self._make(role, name)
        return found

    def _make(self, role: str, name: str) -> TensorVector:
        first = self._phase in ("ascent", "radius", "wants_perturbation")
        if role == "grad":
            scale = self._ascent_scale if first else 1.0 if self._update_scale is None else self._update_scale
            return TensorVector(self, self._snapshot_grads(), scale, role)
        if role == "ascent_grad":
            if self._kept is None:
                raise RuntimeError(
                    f"{self._where()}: step.ascent_grad is there after a perturbation, if the class sets "
                    "keeps_ascent_grad = True; ask step.perturbed first"
                )
            return TensorVector(self, self._kept, self._scale_of_ascent(), role)
        if role == "weights":
            return TensorVector(self, list(self._plan.masters.updated_tensors()), 1.0, role)
        tensors = self._extra.find(self._plan, self._optimizer.state, name)
        return TensorVector(self, tensors, 1.0, "state", name)

    def _writable(self, vector: TensorVector, other: list[Tensor | None], what: str) -> tuple[Any, bool]:
        """Check that this hook may write the vector; return the status if a skipped step must not, and if it is one.

        A state gets tensors of zeros where `other` and the gradient have one.
        """
        role, phase, stepper = vector._role, self._phase, self._stepper
        allowed = {"grad": ("ascent", "descent"), "weights": ("updated",), "state": ("updated",), "ascent_grad": ()}
        if role in allowed and phase not in allowed[role]:
            hooks = " and ".join(f"`{hook}`" for hook in allowed[role]) or "no hook"
            reason = ", so that a skipped step leaves it as it is" if allowed[role] == ("updated",) else ""
            raise RuntimeError(f"{self._where()}: {what} would write to step.{role}, which {hooks} may change{reason}")
        if role not in ("state", "weights"):
            return None, False
        if role == "state" and not stepper.known_skip():
            skip = None if stepper.status.host is not None else stepper.status.skip
            wanted = [None if h is None else g for g, h in zip(self.grad._tensors, other, strict=True)]
            if vector._members is not None:
                wanted = masked(wanted, vector._members)
            found = self._extra.begin(self._plan, self._optimizer.state, vector.name, wanted, skip)
            vector._base._tensors[:] = found
            if vector._members is not None:
                vector._tensors[:] = masked(found, vector._members)
        return stepper.status, stepper.known_skip()

    def _wrote(self, vector: TensorVector) -> None:
        if vector._role == "grad" and self._phase == "descent":
            self._stepper.changed_update = True
        elif vector._role == "weights":
            self._wrote_weights = True

    def _skip_unless(self, finite: Tensor) -> None:
        """Skip this step unless `finite` is True, as far as SAM checks the update's gradients."""
        stepper = self._stepper
        if stepper.settings.check_update:
            if not stepper.keeps_skip and not (self._was_perturbed and self._optimizer.skips_with_ascent):
                count_skipped_step(stepper.status.values)
                stepper.status.skip.zero_()  # it is the last step's, or the ascent's, which does not count
            stepper.keeps_skip = True
            stepper.status.skip.add_(~finite)

    def _use_ascent_grad(self, ascent: TensorVector) -> None:
        """Give the first gradients to the base optimizer, in p.grad, and keep the second ones as step.grad."""
        snapshot, kept = self._snapshot, self._kept
        assert snapshot is not None and kept is not None
        ratio = self.grad._ratio(ascent)
        if not is_one(ratio):
            pairs.axpby(self._plan, kept, kept, kept, ratio, 0.0)
            ascent._scale = self.grad._scale
            ascent._writes += 1
        second = TensorVector(self, list(snapshot.grads), self.grad._scale, "grad")
        for i, (h, g) in enumerate(zip(snapshot.grads, kept, strict=True)):
            if h is None or g is None:
                second._tensors[i] = kept[i] = None
                continue
            if g.dtype is not h.dtype or g.stride() != h.stride():
                g = kept[i] = torch.empty_like(h).copy_(g)
            snapshot.grads[i] = g
            p = self._plan.params[i]
            p.grad = like(g, p)
        snapshot.addresses = None
        self._vectors["grad"] = second
        self._vectors["update"] = TensorVector(self, snapshot.grads, second._scale, "grad")


class Schedule(ABC):
    """Decides for each step whether it perturbs.

    Subclass it to write a schedule of your own. It keeps its state in the parameter groups.
    """

    needs_gradients: ClassVar[bool] = False
    """True if `due` reads the gradients of the first pass."""

    needs_grad_scale: ClassVar[bool] = False
    """True if the schedule compares gradients of several steps, and so needs a GradScaler's scale."""

    def group_state(self) -> dict[str, Any]:
        """Return names and first values of its state. Every group gets them, and those of the first group count."""
        return {"sam_step": 0}

    @abstractmethod
    def due(self, step: Step) -> bool:
        """Return True if the step that begins now perturbs."""

    def stepped(self, step: Step) -> None:
        """Count an update, skipped or not."""
        for group in step.groups:
            group["sam_step"] += 1


def _calls_itself() -> bool:
    """Return True if the function that asks is on the stack twice."""
    frame = sys._getframe(1)
    code, caller = frame.f_code, frame.f_back
    while caller is not None and caller.f_code is not code:
        caller = caller.f_back
    return caller is not None


def _check_none(result: Any, step: Step) -> None:
    if result is not None:
        raise TypeError(
            f"{step._where()} must return None, not {type(result).__name__}: hooks change the step's vectors in place"
        )
