"""SAM as an ordinary torch.optim.Optimizer: the facade.

    g = grad L(w);  e = rho * g / (||g|| + eps);  g_s = grad L(w + e);  w = BASE(w, g_s)

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412.
With adaptive=True, ASAM: e = rho * T^2 g / (||T g|| + eps), T = |w| + eta; Kwon et al., ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from .engine.base_optimizers import BASE_OPTIONS, WrappedBase, check_base, check_base_options, option_names
from .engine.checkpoint import check_state_dict, keep_dtypes, rename_old_keys
from .engine.grad_scaler import report_unscaling
from .engine.guard import Guard, refuse_averages_of_perturbed
from .engine.option_warnings import warn_of_misspelt_options, warn_of_small_rho
from .engine.options import (
    Option,
    check_count,
    check_group,
    check_range,
    declare_options,
    is_number,
    join_options,
    merged,
    overrides,
    set_options,
    signature_of,
    split_base_options,
)
from .engine.parameters import drop_duplicates
from .engine.plan import Precision
from .engine.stepper import Settings, Stepper
from .engine.tensor_norms import check_norm
from .engine.user_warnings import warn_of_abandoned_step
from .engine.wrappers import forward_to_wrapped, wrapper_class
from .step import Number, Schedule, Step

_EPS = 1e-12
_MODES = ("train", "eval")  # of a wrapped base optimizer, which the instance gets as attributes
_DEFAULT: Any = object()  # the class's default: see DEFAULTS
_DEFAULTS = {"rho": 0.05, "adaptive": False, "eta": 0.0, "norm": "global"}
_F = TypeVar("_F", bound=Callable[..., Any])


def _default(hook: _F) -> _F:
    """Mark a hook that does nothing, so that the stepper need not call it."""
    hook.is_default = True  # type: ignore[attr-defined]
    return hook


class SAM(Optimizer):
    """Sharpness-Aware Minimization around a base optimizer, with fused kernels.

    Args:
        params: parameters, named parameters, or parameter groups: dicts, which may set rho, adaptive, eta, perturb and
            the base optimizer's options. All other arguments are the same for all groups.
        base_optimizer: an optimizer class, or a callable that makes an optimizer of parameter groups, such as a
            functools.partial. torch.optim.SGD, Adam, AdamW and fused_sam.Lion are fused with the undo. Any other class
            is wrapped: fused perturbation and undo, and its own step, train() and eval(). fused_sam.MuonWithAdamW takes
            Muon for matrices (docs/bases.md).
        rho: length of the perturbation, in the norm of the weights; 0 is the base optimizer itself.
        adaptive: scale the perturbation by the magnitudes of the weights, as the public SAM package does, which then
            recommends rho 2. fused_sam.ASAM has the defaults of ASAM's authors.
        eta: ASAM's offset, T = |w| + eta; used if adaptive.
        norm: what ||g|| is the norm of: "global", all perturbed parameters; "group", those of the parameter group;
            "tensor", the tensor alone. e then has the length rho in every group, or in every tensor (docs/methods.md).
        eps: added to the gradient norm before dividing by it; None: 1e-12. If the base optimizer has an `eps` of its
            own (Adam), that one is set, and SAM's stays 1e-12; unless base_options sets the base optimizer's.
        backend: "auto", or a name from fused_sam.backends.available(). "auto" obeys FUSED_SAM_BACKEND if that is set.
        check_update: check that the second gradients are finite before the first weight is written, so that an inf or
            a NaN changes nothing. False saves that pass (4 of 44 bytes per parameter, one launch of four) and trusts
            them, as torch.optim.SGD does. Under GradScaler, which has checked them, the pass is left out, except for
            methods that update with other tensors than GradScaler saw.
        max_norm: clip the second gradient to this global norm within the update, as torch.nn.utils.clip_grad_norm_
            would before it. `update_norm` is the norm before clipping. None: no clipping.
        master_weights: keep an fp32 master of every bf16 and fp16 weight in the state, as "master_weight". It is the
            backup too, so that SAM takes no memory on top of mixed-precision SGD with masters. For fused base
            optimizers.
        stochastic_rounding: round bf16 and fp16 weights up or down at random, so that the mean is right; the same
            numbers on every backend. For fused base optimizers.
        seed: the seed of all random numbers, a whole number of 64 bits.
        schedule: which steps perturb (fused_sam.schedule); None: every one. Any other step is the base optimizer's and
            takes one pass.
        decay_in_ascent: the perturbation follows g + weight_decay * w, as in Google's SAM program, where the L2 term is
            a part of the loss. For base optimizers whose weight decay is such a term: SGD, Adam. The update stays the
            base optimizer's, with the L2 term of the unperturbed weights. First gradients are changed in place.
        base_options: the base optimizer's options by name, for those that are named as SAM's or a method's are:
            base_options={"rho": 0.9} for torch.optim.Adadelta. A keyword of such a name is SAM's.
        **options: the base optimizer's own (lr, momentum, weight_decay, ...), and those of a method.

    A group's own options: `rho`, `adaptive`, `eta`, `perturb` (False: updated, but neither perturbed nor counted in
    the norm), and `base_options`.

    The perturbation follows the gradients as they are, also if the base optimizer maximizes. To maximize an objective R
    against its worst case, minimize -R instead of setting the base optimizer's `maximize`.

    State is the base optimizer's, under torch's names. State of bf16 and fp16 weights is fp32. Sharded parameters
    (DTensor: FSDP2's fully_shard, tensor parallelism) are updated in place; every process takes the same steps
    (docs/distributed.md). A step whose first or second gradient is not finite changes no weight and no state; see
    `skipped` and `check_update`.

    Raises:
        TypeError: base_optimizer makes no optimizer, a parameter is no tensor, or one is complex.
        ValueError: an option out of range, or one for all groups in a group, an unknown backend, a parameter in several
            groups, parameters on several devices, masters or stochastic rounding if no weight is bf16 or fp16,
            decay_in_ascent with a base optimizer that has no such term, or with maximize.
        RuntimeError: a backend asked for by name cannot run here.

    Example:
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    # ---- what a method declares (docs/writing-a-method.md) --------------------------------------------------

    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    """The method's own options, by name: `option(0.4, low=0, high=1, help="...")`. Attributes of the instance."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Other defaults of SAM's rho, adaptive, eta and norm."""

    GROUP_STATE: ClassVar[Mapping[str, Any]] = {}
    """Counters that every parameter group gets and a state_dict carries, with their first values."""

    reads_weight_norms: ClassVar[bool] = False
    """True if `radius` reads `step.weight_norms`. The pass over the gradients then reads the weights too."""

    preconditions: ClassVar[bool] = False
    """True if T_w is made of Adam's second moment, as Precond-SAM's is, and not of `adaptive` and `eta`. Weights that
    Adam has not updated yet are not perturbed."""

    keeps_ascent_grad: ClassVar[bool] = False
    """True if the first gradients are needed after the second pass, as `step.ascent_grad`."""

    skips_with_ascent: ClassVar[bool] = True
    """True if the update is skipped where the perturbation was."""

    combines_grads: ClassVar[bool] = False
    """True if the update's gradient is not that of the second pass alone. It is then checked under a GradScaler too,
    and, with keeps_ascent_grad, a first gradient of a part of the batch is refused. SAM notices a `descent` that
    changes the gradient by itself."""

    compares_passes: ClassVar[bool] = True
    """True if a `descent` reads something of the first pass, such as its norm. `local_perturbation()` refuses that."""

    applies_decay: bool = False
    """True if the method applies the weight decay itself, so that a fused update leaves it out."""

    closure_is_empty: bool = False
    """True while a framework's wrapper passes step() a closure that makes no gradients."""

    continues_step: bool = False
    """True if the coming perturbation is a further one of the same step. A skip flag that is set then stays set."""

    mask_prob: float = 1.0
    """Share of the elements that a perturbation moves, drawn at random."""

    @_default
    def ascent(self, step: Step) -> None:
        """Hook: before the norm. May change `step.grad` in place."""

    @_default
    def radius(self, step: Step) -> Any:
        """Hook: between norm and perturbation. Return the length of e, or None for each group's rho."""

    @_default
    def descent(self, step: Step) -> None:
        """Hook: before the update. May change `step.grad` in place, or set `step.update_grad`."""

    @_default
    def updated(self, step: Step) -> None:
        """Hook: after the update, skipped or not. May write to `step.state(name)` and `step.weights`."""

    @_default
    def wants_perturbation(self, step: Step) -> bool:
        """Hook: return True if this step perturbs; asked once per step, if the schedule lets it."""
        return True

    @_default
    def is_scaled(self, param: Tensor) -> bool:
        """Hook: return True if an adaptive perturbation scales this parameter; asked when the tables are built."""
        return True

    def first_pass(self) -> AbstractContextManager[None]:
        """Return a context manager for the first evaluation of step(closure)."""
        return nullcontext()

    def grad_divisor(self) -> int:
        """Return the number of gradients that p.grad is the sum of; the update divides by it."""
        return 1

    # ---- construction ---------------------------------------------------------------------------------------

    # GradScaler.step(optimizer) calls step() with `grad_scale` and `found_inf` set, and leaves skipping to it.
    _step_supports_amp_scaling = True
    _options: ClassVar[dict[str, Option]] = {}  # OPTIONS of the class and of those that it inherits from
    _needs_grad_scale: ClassVar[bool | None] = None  # as the class declares it
    _rho_is_default = False  # True while a group without a rho of its own may get a warning, see warn_of_small_rho

    ascent_grad_scale: Number | None = None
    """What the first gradients are multiplied by, for methods and schedules that compare gradients of different steps.
    Set it for each step, before `needs_second_pass` is read, if needs_grad_scale says so and a GradScaler is used:
    scaler.get_scale(). An update forgets it."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if (wrapper := wrapper_class(cls)) is not None:
            forward_to_wrapped(cls, wrapper, SAM)
            return
        cls._options = declare_options(cls, SAM)
        cls.DEFAULTS, cls.GROUP_STATE = merged(cls, "DEFAULTS"), merged(cls, "GROUP_STATE")
        declared = cls.__dict__.get("needs_grad_scale")
        if isinstance(declared, bool):  # the property adds what the schedule needs
            cls._needs_grad_scale = declared
            del cls.needs_grad_scale
        cls.__signature__ = signature_of(cls, SAM, cls._options, {**_DEFAULTS, **cls.DEFAULTS})  # type: ignore[attr-defined]

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        rho: float = _DEFAULT,
        adaptive: bool = _DEFAULT,
        *,
        eta: float = _DEFAULT,
        norm: str = _DEFAULT,
        eps: float | None = None,
        backend: str = "auto",
        check_update: bool = True,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        schedule: Schedule | None = None,
        decay_in_ascent: bool = False,
        base_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given: Any = base_optimizer
        if isinstance(given, type) and issubclass(given, SAM):
            raise TypeError(
                f"base_optimizer is {given.__name__}, which is SAM itself: "
                "pass the optimizer that is to move the weights, such as torch.optim.SGD"
            )
        check_base(base_optimizer)
        set_options(self, self._options, options)
        options = join_options(options, base_options)
        if eps is not None and "eps" in option_names(base_optimizer) and "eps" not in options:
            options["eps"], eps = eps, None  # of any form that the base optimizer takes
        if eps is not None and not (is_number(eps) and 0 <= eps < math.inf):
            raise ValueError(f"eps must be a finite number of 0 or more, not {eps!r}")
        if max_norm is not None:
            check_range("max_norm", max_norm, 0.0, math.inf, open_low=True)
        if master_weights and stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: choose masters for the best result, "
                "stochastic rounding for the least memory"
            )
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be one of fused_sam.schedule's, such as Every(10), not {schedule!r}")
        self._settings = Settings(
            base_optimizer=base_optimizer,
            base_options=options,
            backend=backend,
            eps=_EPS if eps is None else float(eps),
            max_norm=math.inf if max_norm is None else float(max_norm),
            check_update=bool(check_update),
            precision=Precision(
                bool(master_weights), bool(stochastic_rounding), check_count("seed", seed, 0) % 2**64
            ),
            schedule=schedule,
            decay_in_ascent=bool(decay_in_ascent),
        )
        self._stepper: Stepper | None = None
        passed = {"rho": rho, "adaptive": adaptive, "eta": eta}
        usual = {**_DEFAULTS, **self.DEFAULTS}
        own = {name: usual[name] if value is _DEFAULT else value for name, value in passed.items()}
        norm = check_norm(usual["norm"] if norm is _DEFAULT else norm)
        own.update(perturb=True, **self.group_state())
        self._rho_is_default = rho is _DEFAULT
        self._settings = dataclasses.replace(self._settings, own_options=tuple(own), norm=norm)
        super().__init__(params, own)
        self._make_stepper()
        report_unscaling()
        warn_of_misspelt_options(self)
        base = self.stepper.base
        self.defaults.update({k: v for k, v in base.defaults.items() if k not in self.defaults})
        if base.clashes:
            self.defaults[BASE_OPTIONS] = {name: base.defaults[name] for name in base.clashes}

    def group_state(self) -> dict[str, Any]:
        """Return the counters of method, schedule and random numbers, with their first values."""
        precision, schedule = self._settings.precision, self._settings.schedule
        draws = precision.stochastic_rounding or self.mask_prob < 1
        return {
            **({"rng_offset": 0} if draws else {}),
            **({} if schedule is None else schedule.group_state()),
            **self.GROUP_STATE,
        }

    def _make_stepper(self) -> None:
        stepper = Stepper(self, self._settings)
        stepper.context = Step(stepper)
        self._stepper = stepper
        refuse_averages_of_perturbed(self)
        if isinstance(stepper.base, WrappedBase):
            for mode in stepper.base.modes():
                setattr(self, mode, partial(self._set_mode, mode))

    @property
    def stepper(self) -> Stepper:
        """The engine's Stepper, for methods that order the passes themselves."""
        stepper: Stepper | None = self.__dict__.get("_stepper")
        if stepper is None:
            raise RuntimeError(
                f"{type(self).__name__} was called on a wrapper around the optimizer, or before its constructor: "
                "call it on the SAM optimizer itself, which Lightning and accelerate keep as `.optimizer`"
            )
        return stepper

    # ---- the two steps --------------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool = False, *, grad_scale: Number | None = None) -> None:
        """Save the weights and add e = rho * g / (||g|| + eps) to them, g being the gradients as they are now.

        Weights without a gradient stay where they are. If g is not finite nothing moves, and second_step() will change
        nothing either.

        Args:
            zero_grad: clear the gradients afterwards.
            grad_scale: what the loss was multiplied by, scaler.get_scale(). SAM itself does not need it; methods that
                compare gradients of different steps do (see `needs_grad_scale`). Sets `ascent_grad_scale`.

        If the weights are perturbed already, because a loop has skipped a batch after its first_step(), that
        perturbation is undone first, with one warning.

        Raises:
            RuntimeError: a gradient is sparse, or the call comes from the closure of step(closure).
        """
        stepper = self._usable("first_step()")
        stepper.plain_step_warning_off = True
        unscaled = stepper.grads_unscaled
        if stepper.perturbed is not None or stepper.in_closure:
            self.finish_abandoned_step()
        if unscaled:  # and scaled no longer, whatever the program says
            self.ascent_grad_scale, stepper.grads_unscaled = 1.0, False
        elif grad_scale is not None:
            self.ascent_grad_scale = grad_scale
        stepper.ascent_scale = self.ascent_grad_scale
        with_grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # as torch.no_grad(), which costs 3 us
            stepper.perturb(keep_skip=self.continues_step)
        finally:
            torch._C._set_grad_enabled(with_grad)
        if zero_grad:
            self.zero_grad()

    def finish_abandoned_step(self) -> None:
        """Restore the weights, with one warning, if a loop has skipped a batch after its first_step()."""
        stepper = self.stepper
        if stepper.in_closure:
            raise RuntimeError("first_step() was called inside the closure of step(closure), which makes both passes")
        if stepper.perturbed is not None:
            moved = bool(stepper.perturbed)
            self.restore()
            if moved and not stepper.warned_of_abandoned_step:
                stepper.warned_of_abandoned_step = True
                warn_of_abandoned_step()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and let the base optimizer step with the gradients as they are now.

        A weight that has no gradient now is restored and not updated; one that has a gradient only now is updated.

        Raises:
            RuntimeError: first_step() was not called, or a gradient is sparse (the weights are restored then).
        """
        if self._usable("second_step()").perturbed is None:
            raise RuntimeError("second_step() was called without first_step(): the weights are not perturbed")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, in one of three ways.

        Without a closure: second_step() if the weights are perturbed, else a plain step of the base optimizer.

        With a closure that evaluates the model and calls backward(): a whole SAM step. If gradients have been computed
        since the last update, they are the first gradient, and the closure runs once, at the perturbed weights. If
        not, the closure runs twice, first at the weights. It runs once in all if no group is perturbed (rho 0).
        Gradients are cleared before each run. If the closure raises, the weights are restored.

        Returns:
            The loss of the closure's first run. None without a closure.
        """
        if closure is not None and self.closure_is_empty:
            closure()  # the framework's own hooks before a step
            closure = None
        if (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        ):
            return _step_with_hooks(self, closure)
        return self.run_step(closure)

    # torch would wrap step() in a profiler record and its hooks, which costs 15 us when there are none.
    step.hooked = True  # type: ignore[attr-defined]

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        """Do what step() does, without the hooks that torch runs around it. Methods with their own order override it.

        Returns:
            The loss of the closure's first run. None without a closure.
        """
        stepper = self._usable("a step" if closure is None else "step(closure)")
        if closure is None:
            self._update(stepper)
            return None
        self.refuse_scaled_closure()
        if stepper.perturbed is not None:
            raise RuntimeError(
                "step(closure) was called with perturbed weights: call step() or second_step() to finish the step that "
                "first_step() began, or restore() to undo it"
            )
        evaluate = self.evaluating(closure)
        try:
            new = self._may_perturb() and stepper.has_new_grads()
            if not new:
                self.zero_grad()
                with self.first_pass():
                    loss = evaluate()
            if new and not self.needs_second_pass:
                # Known only now, from the gradients: the closure's own run is the one pass.
                self.zero_grad()
                loss = evaluate()
            elif self.needs_second_pass:
                self.first_step(zero_grad=True)
                second = evaluate()
                if new:
                    loss = second
                elif stepper.loss_check is not None:
                    self.note_losses(loss, second)
        except BaseException:
            self.restore()
            raise
        self._update(stepper)
        return loss

    def _update(self, stepper: Stepper) -> None:
        with_grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            stepper.update(divisor=self.grad_divisor())
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler, which set them, deletes them after a step only
                self.__dict__.pop(name, None)
            raise
        finally:
            torch._C._set_grad_enabled(with_grad)
        self.__dict__.pop("ascent_grad_scale", None)

    def note_losses(self, loss: Any, perturbed_loss: Any) -> None:
        """Note a perturbing step's two losses, for a warning if rho is too large for a fresh network."""
        check = self.stepper.loss_check
        if check is not None and check.note(loss, perturbed_loss):
            self.stepper.loss_check = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch.optim.Optimizer.zero_grad() does."""
        stepper: Stepper | None = self.__dict__.get("_stepper")  # a framework's wrapper has none
        if stepper is not None and stepper.unfinished is not None:  # an update that reads them
            stepper.finish_update()
        super().zero_grad(set_to_none)

    def evaluating(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure with gradients enabled, in which steps of its own are refused."""
        stepper = self.stepper

        @torch.enable_grad()
        def evaluate(*arguments: Any) -> Any:
            stepper.in_closure = True
            try:
                return closure(*arguments)
            finally:
                stepper.in_closure = False

        return evaluate

    def refuse_scaled_closure(self) -> None:
        """Raise RuntimeError if step(closure) runs under a GradScaler."""
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) cannot work: the scaler looks for infs before the closure has "
                "made the gradients; use two passes by hand and scaler.step(optimizer), or fused_sam.training.sam_step"
            )

    def restore(self) -> None:
        """Undo the perturbation, bit for bit, without an update. Does nothing to weights that are not perturbed.

        Inside `with unperturbed()` it ends the step: the weights stay as they are when the block ends.
        """
        self.stepper.restore()
        self.stepper.grads_unscaled = False
        self.__dict__.pop("ascent_grad_scale", None)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Restore the clean weights inside `with`, for evaluating or saving between first_step() and second_step().

        Perturbed weights are restored, bit for bit, and perturbed again afterwards, bit for bit. That keeps a copy of
        the perturbed weights. Does nothing if the weights are not perturbed. Writes to the weights inside
        are lost when the step ends.
        """
        with self.stepper.unperturbed():
            yield

    def guard(self, model: nn.Module) -> Guard:
        """Make it an error to use the model while its weights are perturbed; .remove() on the result ends that.

        Args:
            model: its forward pass in eval mode and its state_dict() raise RuntimeError then. Of a
                torch.optim.swa_utils.AveragedModel, update_parameters() does.
        """
        return Guard(self, model)

    def _may_perturb(self) -> bool:
        """Return True if this step perturbs, as far as is known before there are gradients."""
        schedule = self._settings.schedule
        if schedule is not None and not schedule.needs_gradients:
            return self.needs_second_pass
        return self.stepper.any_perturbed(self.stepper.perturb_groups())

    # ---- what a step left to read ---------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """True between first_step() and second_step()."""
        return self.stepper.perturbed is not None or self.stepper.unfinished is not None

    @property
    def needs_second_pass(self) -> bool:
        """True if this step perturbs, and so makes a second pass: read it after the first backward().

        False if rho is 0 and, with a schedule or a method that perturbs now and then, in the steps between. step()
        finishes such a step, with the gradients that are there.
        """
        self.stepper.plain_step_warning_off = True
        return self.stepper.decide()

    @property
    def needs_grad_scale(self) -> bool:
        """True if `ascent_grad_scale` must be set under a GradScaler, because gradients of several steps are compared.

        By default True for methods with an `ascent`, `radius` or `descent` hook; a class sets it to False if its hooks
        do not depend on the gradients' scale. A method that compares the two gradients of one step needs it only if
        scaler.unscale_() comes between.
        """
        schedule = self._settings.schedule
        compares = self._needs_grad_scale
        if compares is None:
            compares = any(overrides(type(self), hook) for hook in ("ascent", "radius", "descent"))
        return compares or self.decay_in_ascent or (schedule is not None and bool(schedule.needs_grad_scale))

    @property
    def step_was_skipped(self) -> bool:
        """`skipped` as a bool, which waits for the device. Do not step a learning-rate scheduler after such a step."""
        return bool(self.skipped)

    @property
    def skipped(self) -> Tensor:
        """True if the last step met a gradient that was not finite, and changed nothing.

        A 0-dim bool tensor on the weights' device: reading its value waits for that device, taking it does not.
        """
        return self.stepper.status.skip != 0

    @property
    def grad_norm(self) -> Tensor:
        """||T g||, the global norm of the last first_step()'s gradients: 0-dim, fp64 on the CPU, fp32 elsewhere.

        Without the loss scale, as `update_norm`. Between the two steps it has that scale, unless ascent_grad_scale or
        first_step(grad_scale=...) was given. 0 after a step that did not perturb.
        """
        norm, scale = self.stepper.status.ascent_norm.clone(), self.stepper.ascent_scale
        return norm if scale is None else norm / (scale.to(norm) if isinstance(scale, Tensor) else scale)

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """Return the norm of the gradients as they are now, as the public SAM package's method of that name does.

        Each gradient counts times |w| in an adaptive group; eta, `perturb` and a loss scale are left out of account.
        """
        norms = [
            ((p.abs() if group["adaptive"] else 1.0) * p.grad).norm(p=2).to(self.stepper.device())
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return torch.stack(norms).norm(p=2) if norms else torch.zeros((), device=self.stepper.device())

    def note_unscaled(self, scale: Tensor) -> None:
        """Note that scaler.unscale_(optimizer) has unscaled the gradients, which GradScaler calls."""
        self.stepper.grads_unscaled, self.stepper.noted_scale = True, scale

    @property
    def update_norm(self) -> Tensor:
        """||g_s||, the global norm of the last update's gradients, before clipping and without the loss scale.

        0-dim, fp64 on the CPU, fp32 elsewhere. NaN means that no pass took it, not that a gradient was NaN: under
        GradScaler or with check_update=False, unless max_norm is set (see check_update).
        """
        return self.stepper.update_norm()

    @property
    def schedule(self) -> Schedule | None:
        """Which steps perturb; None: every one."""
        schedule: Schedule | None = self._settings.schedule
        return schedule

    @property
    def decay_in_ascent(self) -> bool:
        """True if the perturbation follows g + weight_decay * w."""
        return self._settings.decay_in_ascent

    @property
    def backend(self) -> str:
        """The name of the backend that runs this optimizer's primitives."""
        return self.stepper.backend.name

    @property
    def base_optimizer(self) -> SAM:
        """The optimizer itself: for programs that hand the public SAM package's `base_optimizer` to a scheduler."""
        return self

    # ---- torch.optim.Optimizer's own ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not set are the constructor's. A base optimizer may split it."""
        before = len(self.param_groups)
        param_group = self._with_base_options(param_group, before)
        has_rho = isinstance(param_group, dict) and "rho" in param_group  # torch adds the default to the dict
        stepper = self._stepper
        if stepper is not None and isinstance(stepper.base, WrappedBase) and isinstance(param_group, dict):
            own = {name: param_group.get(name, self.defaults[name]) for name in self._settings.own_options}
            stepper.base.add_group(param_group, own)
        else:
            super().add_param_group(param_group)
        try:
            for group in self.param_groups[before:]:
                drop_duplicates(group)  # torch has warned
                check_group(group, before)
            self._refuse_common_options(param_group, before)
            if self._rho_is_default and not has_rho:
                self._rho_is_default = not warn_of_small_rho(self.param_groups[before])
            if stepper is not None:
                stepper.check_decay_in_ascent(self.param_groups[before:], before)
                stepper.base.numbers(self.param_groups[before:])
                stepper.new_plan()
                warn_of_misspelt_options(self, before)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _with_base_options(self, group: dict[str, Any], k: int) -> dict[str, Any]:
        """Return group k with the base optimizer's options where they belong (see split_base_options)."""
        if isinstance(group, dict) and BASE_OPTIONS in group:
            group = split_base_options(group, self._settings.own_options, k)
        if self._stepper is not None:  # the constructor gives them to the base optimizer, which knows its defaults
            base = self._stepper.base
            given = group.pop(BASE_OPTIONS, {}) if isinstance(group, dict) else {}
            check_base_options(given, base.clashes, base.cls.__name__, k)
            if base.clashes and isinstance(group, dict):
                group = {**group, BASE_OPTIONS: {**self.defaults[BASE_OPTIONS], **given}}
        return group

    def _refuse_common_options(self, group: dict[str, Any], k: int) -> None:
        """Refuse options in a group that only the constructor reads."""
        common = [p.name for p in inspect.signature(SAM.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        base = option_names(self._settings.base_optimizer)
        names = {*common, *self._options, "base_optimizer"} - {*self._settings.own_options, *base, BASE_OPTIONS}
        if clash := sorted(names & group.keys()):
            raise ValueError(
                f"group {k} sets {clash[0]}, which is one for all groups: "
                f"pass it to {type(self).__name__} beside the groups"
            )

    @torch.no_grad()
    def _set_mode(self, mode: str) -> None:
        self.refuse_perturbed(f"{mode}() was called")
        base = self.stepper.base
        assert isinstance(base, WrappedBase)
        base.set_mode(mode)
        self.stepper.plan.masters.record_versions()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own: the base optimizer's state and the groups, which torch.optim.SGD loads as well.

        Raises:
            RuntimeError: the weights are perturbed, so that a checkpoint taken now would hold perturbed weights.
        """
        self.refuse_perturbed("state_dict() was called")
        self._before_saving()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of SAM or of the bare base optimizer, whose groups keep SAM's options as they are.

        Floating-point state keeps the dtype that it was saved with, except for that of torch's optimizers without a
        fused update, which need the parameter's.

        Raises:
            RuntimeError: the weights are perturbed, or will be again after `with unperturbed()`.
            ValueError, TypeError: not an optimizer's state_dict, or one of other parameters; nothing is loaded then.
        """
        self._usable("load_state_dict()")
        self.refuse_perturbed("load_state_dict() was called")
        self._before_saving()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes an optimizer's state_dict, not {type(state_dict).__name__}")
        checked: dict[str, Any] = {}
        self._checked_state: dict[str, Any] | None = checked
        base, own = self.stepper.base, self._settings.own_options

        def check(_: Optimizer, adapted: Mapping[str, Any]) -> dict[str, Any]:
            renamed = rename_old_keys(adapted)
            fused, torchs = base.rule is not None, not base.keeps_dtypes
            groups = self.param_groups
            checked.update(check_state_dict(renamed, groups, own, base.clashes, fused=fused, torchs=torchs))
            base.upgrade({}, checked["param_groups"])
            for group, own_group in zip(checked["param_groups"], groups, strict=True):
                for name, value in self.defaults.items():
                    if name in own_group:  # an option that a checkpoint of an older version lacks
                        group.setdefault(name, value)
                if issubclass(base.cls, torch.optim.AdamW) and "decoupled_weight_decay" in group:
                    group["decoupled_weight_decay"] = True
            for k, group in enumerate(checked["param_groups"]):
                check_group(group, k)
            return checked

        last = self.register_load_state_dict_pre_hook(check)  # after hooks of the user's, which may adapt it
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            last.remove()
            self._checked_state = None

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_perturbed("the optimizer was copied or pickled")
        self._before_saving()
        # A method's options and public attributes; not what GradScaler or a learning-rate scheduler puts here.
        foreign = ("defaults", "state", "param_groups", "grad_scale", "found_inf", "ascent_grad_scale")
        own = {
            k: v
            for k, v in vars(self).items()
            if not (k.startswith("_") or k in foreign or (callable(v) and (hasattr(type(self), k) or k in _MODES)))
        }
        return {**super().__getstate__(), **own, "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if checked := self.__dict__.get("_checked_state"):
            # Before it replaces the optimizer's state, which is one operation.
            if self.stepper.base.keeps_dtypes:
                keep_dtypes(state, checked)
            self.stepper.base.upgrade(state["state"], state["param_groups"])
        super().__setstate__(state)
        self.__dict__.pop("ascent_grad_scale", None)
        if "_settings" in state:  # a copy or an unpickled optimizer; load_state_dict() brings state and groups alone
            self._stepper = None
            self._make_stepper()
        elif self._stepper is not None:
            self._stepper.forget_state()
            self._stepper.context._forget()

    def _before_saving(self) -> None:
        """Bring what is known on the device only into groups and state."""
        self.stepper.save_rng_offset()
        self.stepper.context._settle()

    def refuse_suspended(self, what: str) -> None:
        """Raise RuntimeError inside `with unperturbed()`, where the weights are restored only temporarily."""
        self._usable(what)

    def _usable(self, what: str) -> Stepper:
        """Return the stepper, unless the weights are restored only temporarily."""
        stepper: Stepper = self.__dict__.get("_stepper") or self.stepper
        if stepper.unfinished is not None:
            stepper.finish_update()
        if stepper.suspended:
            raise RuntimeError(
                f"{what} inside `with optimizer.unperturbed():`, after which the weights are perturbed again: "
                "leave it first"
            )
        return stepper

    def refuse_perturbed(self, what: str) -> None:
        """Raise RuntimeError if the weights are perturbed, because `what` needs the clean ones."""
        if self.stepper.unfinished is not None:
            self.stepper.finish_update()
        if self.stepper.perturbed is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), where the weights are perturbed: "
                "call second_step() to finish the step, restore() to undo it, or do this "
                "inside `with optimizer.unperturbed():`"
            )


def _run_step(optimizer: SAM, closure: Callable[..., Any] | None = None) -> Any:
    return optimizer.run_step(closure)


_step_with_hooks = Optimizer.profile_hook_step(_run_step)
SAM.__signature__ = signature_of(SAM, SAM, {}, _DEFAULTS)  # type: ignore[attr-defined]
