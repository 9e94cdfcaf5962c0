"""SAM as an ordinary torch.optim.Optimizer: the facade users see.

    g = grad L(w);  e = rho * g / (||g|| + eps);  g_s = grad L(w + e);  w = BASE(w, g_s)

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412.
With adaptive=True, ASAM: e = rho * T^2 g / (||T g|| + eps), T = |w| + eta; Kwon et al., ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import backends
from .backends.contract import (
    DRAWS,
    NORM,
    SKIP,
    UPDATE_NORM,
)
from .engine.base_optimizers import Wrapped, check_base, make_base
from .engine.checkpoint import check_state_dict, keep_numbers
from .engine.options import check_count, check_options, check_range, is_number
from .engine.plan import Precision
from .engine.stale_grads import fresh_gradients
from .engine.stepper import Engine
from .schedule import Schedule

_EPS = 1e-12


class SAM(Engine):
    """Sharpness-Aware Minimization around a base optimizer, with fused kernels.

    Args:
        params: parameters, named parameters, or parameter groups: dicts, which may set rho, adaptive, eta, perturb and
            the base optimizer's options. Everything else below is one for all groups.
        base_optimizer: an optimizer class. torch.optim.SGD, Adam and AdamW are fused with the undo; any other class is
            wrapped: fused perturbation and undo, its own step, and its train() and eval() where it has them.
        rho: length of the perturbation, in the norm of the weights; 0 is the base optimizer itself.
        adaptive: scale the perturbation by the weights' magnitudes (ASAM).
        eta: ASAM's offset, T = |w| + eta; used where adaptive.
        eps: added to the gradient norm before dividing by it; None: 1e-12. Where the base optimizer has an `eps` of its
            own (Adam), that one is set, and SAM's stays 1e-12.
        backend: "auto", or a name from fused_sam.backends.available(). "auto" obeys FUSED_SAM_BACKEND if that is set.
        check_update: look through the second gradients before the first weight is written, so that an inf or a NaN
            among them changes nothing. False saves that pass (4 of 44 bytes a parameter, one launch of four) and trusts
            them, as torch.optim.SGD does. Under GradScaler, which has looked already, the pass is left out anyway,
            but for methods that update with other tensors than it saw.
        max_norm: clip the second gradient to this global norm within the update, as torch.nn.utils.clip_grad_norm_
            would before it; `update_norm` tells the norm before clipping. None: no clipping.
        master_weights: keep an fp32 master of every bf16 and fp16 weight in the state, as "master_weight". It is the
            backup as well: beside mixed-precision SGD with masters, SAM then takes no memory. Fused base optimizers
            only.
        stochastic_rounding: round bf16 and fp16 weights up or down at random so that the mean is right, from `seed`;
            the same numbers on every backend.
        seed: of whatever is drawn at random; 64 bits.
        schedule: which steps perturb (fused_sam.schedule); None: every one. A step that does not is the base
            optimizer's and takes one pass.
        **base_options: the base optimizer's own (lr, momentum, weight_decay, ...).

    A group's own options: `rho`, `adaptive`, `eta`, and `perturb` (False: updated, but neither perturbed nor counted in
    the norm). The norm is global over all perturbed groups.

    The perturbation follows the gradients as they are, whatever the base optimizer makes of them: to maximize an
    objective R against its worst case, minimize -R rather than setting the base optimizer's `maximize`.

    State is the base optimizer's, under torch's names. Weights of bf16 or fp16 have theirs in fp32.
    Sharded parameters (DTensor: FSDP2's fully_shard, tensor parallelism) are worked on where they lie; every process
    takes the same steps. See docs/distributed.md.
    A step whose first or second gradient is not finite changes no weight and no state; see `skipped`, `check_update`.

    Raises:
        TypeError: base_optimizer is no class, params hold no tensors, or complex weights.
        ValueError: an option out of range, or one for all groups in a group, an unknown backend, duplicate parameters,
            parameters on several devices, masters or random rounding where no weight is bf16 or fp16.
        RuntimeError: a backend asked for by name cannot run here.

    Example:
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    # GradScaler.step(optimizer) calls step() with `grad_scale` and `found_inf` set, and leaves skipping to it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        eps: float | None = None,
        backend: str = "auto",
        check_update: bool = True,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        schedule: Schedule | None = None,
        **base_options: Any,
    ) -> None:
        if isinstance(base_optimizer, type) and issubclass(base_optimizer, SAM):
            raise TypeError(
                f"base_optimizer is {base_optimizer.__name__}, which is SAM itself: "
                "pass the optimizer that is to move the weights, such as torch.optim.SGD"
            )
        check_base(base_optimizer)
        if eps is not None and not (is_number(eps) and 0 <= eps < math.inf):
            raise ValueError(f"eps must be a finite number of 0 or more, not {eps!r}")
        if eps is not None and "eps" in inspect.signature(base_optimizer).parameters:
            base_options["eps"], eps = eps, None
        if max_norm is not None:
            check_range("max_norm", max_norm, 0.0, math.inf, open_low=True)
        if master_weights and stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding are two answers to one question: choose masters for the best "
                "result, stochastic rounding for the least memory"
            )
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be one of fused_sam.schedule's, such as Every(10), not {schedule!r}")
        self._eps = _EPS if eps is None else float(eps)
        self._max_norm = math.inf if max_norm is None else float(max_norm)
        seed = check_count("seed", seed, 0) % 2**64
        self._precision = Precision(bool(master_weights), bool(stochastic_rounding), seed)
        self._schedule = schedule
        self._backend_name = backend
        self._check_update = bool(check_update)
        self._base_class = base_optimizer
        self._base_options = base_options
        self._forget()
        own = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True, **self._own_defaults()}
        self._own_options = tuple(own)
        super().__init__(params, own)
        self._backend = backends.choose(backend, self._device())
        self._make_base()
        self.defaults.update({k: v for k, v in self._base.defaults.items() if k not in self.defaults})
        self._check_precision()
        self._plan = self._new_plan()

    # ---- the two steps ------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb: save the weights and add e = rho * g / (||g|| + eps) to them, g being the gradients as they are now.

        Weights without a gradient stay where they are. Where g is not finite nothing moves, and second_step() will
        change nothing either.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        self._refuse_misuse("first_step()")
        self._knows_two_steps = True
        if self._perturbed is not None:
            raise RuntimeError(
                "first_step() was called twice: the weights are perturbed already; call second_step() to update, "
                "or restore() to undo the perturbation without an update"
            )
        if self.perturbs:
            self._climb(self._groups())
        else:
            self._status()[:DRAWS].zero_()
            self._perturbed = self._planned().nothing
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Descend: restore the weights and let the base optimizer step with the gradients as they are now.

        A weight that has no gradient now is restored and not updated; one that has a gradient only now is updated.

        Raises:
            RuntimeError: first_step() was not called, or a gradient is sparse (the weights are restored then).
        """
        self._refuse_misuse("second_step()")
        if self._perturbed is None:
            raise RuntimeError("second_step() was called without first_step(): the weights are not perturbed")
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, in any of three ways.

        Without a closure: second_step() if the weights are perturbed, else a plain step of the base optimizer.

        With a closure that evaluates the model and calls backward(): a whole SAM step. If gradients have been computed
        since the last update, they are the first gradient and the closure runs once, at the perturbed weights; if not,
        the closure runs twice, first at the weights. It runs once in all where no group is perturbed (rho 0).
        Gradients are cleared before each run. If the closure raises, the weights are restored.

        Returns:
            The loss: of the closure's first run. None without a closure.
        """
        return self._whole_step(closure)

    def _whole_step(self, closure: Callable[..., Any] | None) -> Any:
        """step() without what torch wraps around it: a method with its own way runs hooks once."""
        if closure is None:
            self._step()
            return None
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) cannot work: the scaler looks for infs before the closure has "
                "made the gradients; use two passes by hand and scaler.step(optimizer), or fused_sam.training.sam_step"
            )
        if self._perturbed is not None:
            raise RuntimeError(
                "step(closure) was called with perturbed weights: call step() or second_step() to finish the step that "
                "first_step() began, or restore() to undo it"
            )
        self._refuse_misuse("step(closure)")
        evaluate = torch.enable_grad()(closure)
        try:
            fresh = self._may_perturb() and fresh_gradients(self._parameters())
            if not fresh:
                self.zero_grad()
                with self._first_pass():
                    loss = evaluate()
            if fresh and not self.perturbs:  # known only now, from the gradients: the closure's own run is the one pass
                self.zero_grad()
                loss = evaluate()
            elif self.perturbs:
                self.first_step(zero_grad=True)
                second = evaluate()
                loss = second if fresh else loss
        except BaseException:
            self.restore()
            raise
        self._step()
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the perturbation, bit for bit, without an update. Does nothing to weights that are not perturbed."""
        self._refuse_misuse("restore()")
        self._decision = None
        if self._perturbed is None:
            return
        plan = self._planned()
        plan.follow(self.state, self._perturbed)
        for job in self._perturbed:
            job.backend.restore(job.table)
        self._perturbed = self._decision = self._kept = None
        self._wrote()

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """The clean weights, for evaluating or saving between first_step() and second_step(): within `with`, perturbed
        weights are restored, bit for bit, and afterwards perturbed again, bit for bit.

        Keeps a copy of the perturbed weights meanwhile. Does nothing where the weights are not perturbed. What is
        written to the weights inside is lost with the end of the step.
        """
        if self._perturbed is None:
            yield
            return
        plan = self._planned()
        jobs = self._perturbed
        kept = [[t.detach().clone() for t in job.table.models or job.table.weights] for job in jobs]
        with torch.no_grad():
            for job in jobs:
                job.backend.restore(job.table)
        self._perturbed, self._lent = None, True
        try:
            yield
        finally:
            self._perturbed, self._lent = jobs, False
            with torch.no_grad():
                plan.follow(self.state, jobs)
                for job, values in zip(jobs, kept, strict=True):
                    torch._foreach_copy_(job.table.models or job.table.weights, values)
            self._wrote()

    # ---- what a step left to read -------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether the weights are between first_step() and second_step()."""
        return self._perturbed is not None

    @property
    def perturbs(self) -> bool:
        """Whether this step perturbs, and so makes a second pass: ask after the first backward(), before first_step().

        False where rho is 0 and, with a schedule or a method that perturbs now and then, on the steps between. Such a
        step is finished by step(), with the gradients that are there.
        """
        self._knows_two_steps = True
        if self._decision is None:
            self._decision = self._perturbs(self._groups()) and self._due()
        return self._decision

    @property
    def step_was_skipped(self) -> bool:
        """`skipped` as a bool, which waits for the device: learning-rate schedulers should not step then."""
        return bool(self.skipped)

    @property
    def skipped(self) -> Tensor:
        """Whether the last step met a gradient that was not finite and changed nothing.

        A 0-dim bool tensor on the weights' device: reading its value waits for that device, taking it does not.
        """
        return self._status()[SKIP] != 0

    @property
    def grad_norm(self) -> Tensor:
        """||T g||, the global norm of the last first_step()'s gradients: 0-dim, fp64 on the CPU, fp32 elsewhere."""
        return self._status()[NORM].clone()

    @property
    def update_norm(self) -> Tensor:
        """||g_s||, the global norm of the gradients of the last update, before clipping and with the loss scale undone:
        0-dim, fp64 on the CPU, fp32 elsewhere.

        NaN where no pass took it (GradScaler or check_update=False, without max_norm; see check_update).
        """
        norm = self._status()[UPDATE_NORM].clone()
        if self._scale is not None:
            norm = norm / self._scale.to(norm)
        return norm if self._took_update_norm else torch.full_like(norm, math.nan)

    @property
    def backend(self) -> str:
        """The name of the backend that runs this optimizer's primitives."""
        return self._backend.name

    @property
    def base_optimizer(self) -> SAM:
        """The optimizer itself: for programs that hand the public SAM package's `base_optimizer` to a scheduler."""
        return self

    # ---- torch.optim.Optimizer's own ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not set are the constructor's."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            if len({id(p) for p in group["params"]}) != len(group["params"]):
                raise ValueError(f"group {before} holds a parameter twice; pass each parameter once")
            check_options(group, before)
            self._refuse_options_of_the_whole(param_group, before)
            if self._plan is not None:
                self._group_numbers(group, before)
                self._new_plan()
        except BaseException:
            del self.param_groups[before:]
            raise

    def _make_base(self) -> None:
        self._base = make_base(self._base_class, self, self._base_options, self._max_norm)
        if isinstance(self._base, Wrapped):
            for mode in self._base.modes():
                setattr(self, mode, partial(self._switch, mode))

    @torch.no_grad()
    def _switch(self, mode: str) -> None:
        self._refuse_perturbed(f"{mode}() was called")
        assert isinstance(self._base, Wrapped)
        self._base.switch(mode)
        self._wrote()

    def _refuse_options_of_the_whole(self, group: dict[str, Any], k: int) -> None:
        """A group would keep what only the constructor reads, and nothing would come of it."""
        constructors = [inspect.signature(cls.__init__) for cls in type(self).__mro__ if issubclass(cls, SAM)]
        whole = {p.name for c in constructors for p in c.parameters.values() if p.kind is p.KEYWORD_ONLY}
        whole = (whole | {"base_optimizer"}) - {*self._own_options, *inspect.signature(self._base_class).parameters}
        if clash := sorted(whole & group.keys()):
            raise ValueError(
                f"group {k} sets {clash[0]}, which is one for all groups: "
                f"pass it to {type(self).__name__} beside the groups"
            )

    def state_dict(self) -> dict[str, Any]:
        """torch's own: the base optimizer's state and the groups, which torch.optim.SGD loads as well.

        Raises:
            RuntimeError: the weights are perturbed, so that a checkpoint taken now would hold perturbed weights.
        """
        self._refuse_perturbed("state_dict() was called")
        self._count_draws()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of SAM or of the bare base optimizer, whose groups keep SAM's options as they are.

        Floating-point state keeps the dtype that it was saved with.

        Raises:
            RuntimeError: the weights are perturbed, or will be again after `with unperturbed()`.
            ValueError, TypeError: not an optimizer's state_dict, or one of other parameters; nothing is loaded then.
        """
        self._refuse_misuse("load_state_dict()")
        self._refuse_perturbed("load_state_dict() was called")
        self._count_draws()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes an optimizer's state_dict, not {type(state_dict).__name__}")
        checked: dict[str, Any] = {}

        def check(_: Optimizer, adapted: Mapping[str, Any]) -> dict[str, Any]:
            checked.update(check_state_dict(adapted, self.param_groups, self._own_options))
            for group in checked["param_groups"]:  # as torch's optimizers do for options that older ones lack
                for name, value in self.defaults.items():
                    group.setdefault(name, value)
                if issubclass(self._base_class, torch.optim.AdamW) and "decoupled_weight_decay" in group:
                    group["decoupled_weight_decay"] = True
            for k, group in enumerate(checked["param_groups"]):
                check_options(group, k)
            return checked

        last = self.register_load_state_dict_pre_hook(check)  # after hooks of the user's, which may adapt it
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            last.remove()
        keep_numbers(self, checked)
        self._numbers = self._host_numbers = None  # made anew, with the groups' count of draws

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("the optimizer was copied or pickled")
        self._count_draws()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._copied}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if "_base_class" in state:  # a copy or an unpickled optimizer; load_state_dict() brings state and groups alone
            self._backend = backends.choose(self._backend_name, self._device())
            self._make_base()
            self._plan = self._new_plan()
        elif self._plan is not None:
            self._plan.forget_state()
