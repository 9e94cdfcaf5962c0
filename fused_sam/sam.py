"""SAM as an ordinary torch.optim.Optimizer: the facade users see.

    g = grad L(w);  e = rho * g / (||g|| + eps);  g_s = grad L(w + e);  w = BASE(w, g_s)

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412.
With adaptive=True, ASAM: e = rho * T^2 g / (||T g|| + eps), T = |w| + eta; Kwon et al., ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

import inspect
import math
from array import array
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends
from .backends.contract import NORM, SKIP, STATUS_SIZE, UPDATE_NORM, Backend, Group, status_dtype
from .base import check_base, make_base
from .checkpoint import check_state_dict, keep_numbers
from .freshness import fresh_gradients, mark_used
from .plan import Job, Plan, Scan, attached

_EPS = 1e-12


class SAM(Optimizer):
    """Sharpness-Aware Minimization around a base optimizer, with fused kernels.

    Args:
        params: parameters, parameter groups (dicts, which may set any option below but base_optimizer, eps and
            backend), or named parameters.
        base_optimizer: an optimizer class. torch.optim.SGD is fused with the undo; any other class is wrapped: fused
            perturbation and undo, its own step.
        rho: length of the perturbation, in the norm of the weights; 0 is the base optimizer itself.
        adaptive: scale the perturbation by the weights' magnitudes (ASAM).
        eta: ASAM's offset, T = |w| + eta; used where adaptive.
        eps: added to the gradient norm before dividing by it. Where the base optimizer has an `eps` of its own (Adam),
            that one is set, and SAM's stays 1e-12.
        backend: "auto", or a name from fused_sam.backends.available(). "auto" obeys FUSED_SAM_BACKEND if that is set.
        check_update: look through the second gradients before the first weight is written, so that an inf or a NaN
            among them changes nothing. False saves that pass (4 of 44 bytes a parameter, one launch of four) and trusts
            them, as torch.optim.SGD does. Under GradScaler, which has looked already, the pass is left out anyway.
        **base_options: the base optimizer's own (lr, momentum, weight_decay, ...).

    A group's own options: `rho`, `adaptive`, `eta`, and `perturb` (False: updated, but neither perturbed nor counted in
    the norm). The norm is global over all perturbed groups.

    The perturbation follows the gradients as they are, whatever the base optimizer makes of them: to maximize an
    objective R against its worst case, minimize -R rather than setting the base optimizer's `maximize`.

    State is the base optimizer's, under torch's names. Weights of bf16 or fp16 have their momentum in fp32.
    A step whose first or second gradient is not finite changes no weight and no state; see `skipped`, `check_update`.

    Raises:
        TypeError: base_optimizer is no class, params hold no tensors, or complex weights.
        ValueError: an option out of range, an unknown backend, duplicate parameters, parameters on several devices.
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
        params: Any,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        eps: float = _EPS,
        backend: str = "auto",
        check_update: bool = True,
        **base_options: Any,
    ) -> None:
        check_base(base_optimizer)
        if isinstance(base_optimizer, type) and issubclass(base_optimizer, SAM):
            raise TypeError("base_optimizer is SAM itself; pass the optimizer that is to move the weights")
        if not (_is_number(eps) and 0 <= eps < math.inf):
            raise ValueError(f"eps must be a finite number of 0 or more, not {eps!r}")
        if eps != _EPS and "eps" in inspect.signature(base_optimizer).parameters:
            base_options["eps"], eps = eps, _EPS
        self._eps = float(eps)
        self._backend_name = backend
        self._check_update = bool(check_update)
        self._base_class = base_optimizer
        self._base_options = base_options
        self._forget()
        super().__init__(params, {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True})
        self._backend = backends.choose(backend, self._device())
        self._base = make_base(base_optimizer, self, base_options)
        self.defaults.update({k: v for k, v in self._base.defaults.items() if k not in self.defaults})
        self._plan = Plan(self.param_groups, self._backend)

    # ---- the two steps ------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb: save the weights and add e = rho * g / (||g|| + eps) to them, g being the gradients as they are now.

        Weights without a gradient stay where they are. Where g is not finite nothing moves, and second_step() will
        change nothing either.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        if self._perturbed is not None:
            raise RuntimeError(
                "first_step() was called twice: the weights are perturbed already; call second_step() to update, "
                "or restore() to undo the perturbation without an update"
            )
        groups = self._groups()
        if self._perturbs(groups):
            plan, scan = self._scan()
            jobs = plan.perturbation(scan, [group["perturb"] for group in self.param_groups])
            with attached(jobs, scan):
                self._norm(jobs, groups, scaled=True)
                for job in jobs:
                    job.backend.perturb(job.table, groups, self._status())
            self._perturbed = jobs
        else:
            self._status().zero_()
            self._perturbed = self._planned().nothing
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Descend: restore the weights and let the base optimizer step with the gradients as they are now.

        A weight that has no gradient now is restored and not updated; one that has a gradient only now is updated.

        Raises:
            RuntimeError: first_step() was not called, or a gradient is sparse (the weights are restored then).
        """
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
        if closure is None:
            self._step()
            return None
        if self._perturbed is not None:
            raise RuntimeError(
                "step(closure) was called with perturbed weights: call step() or second_step() to finish the step that "
                "first_step() began, or restore() to undo it"
            )
        evaluate = torch.enable_grad()(closure)
        perturbs = self._perturbs(self._groups())
        fresh = perturbs and fresh_gradients(self._parameters())
        if not fresh:
            self.zero_grad()
            loss = evaluate()
        if perturbs:
            self.first_step(zero_grad=True)
            try:
                second = evaluate()
            except BaseException:
                self.restore()
                raise
            loss = second if fresh else loss
        self._step()
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the perturbation, bit for bit, without an update. Does nothing to weights that are not perturbed."""
        if self._perturbed is None:
            return
        self._planned()
        for job in self._perturbed:
            job.backend.restore(job.table)
        self._perturbed = None

    # ---- what a step left to read -------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether the weights are between first_step() and second_step()."""
        return self._perturbed is not None

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
        """||g_s||, the global norm of the gradients of the last update: 0-dim, fp64 on the CPU, fp32 elsewhere.

        NaN where no pass took it (GradScaler, check_update=False).
        """
        norm = self._status()[UPDATE_NORM].clone()
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
            _check_options(group, before)
            if self._plan is not None:
                self._group_numbers(group, before)
                Plan(self.param_groups, self._backend)
        except BaseException:
            del self.param_groups[before:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's own: the base optimizer's state and the groups, which torch.optim.SGD loads as well.

        Raises:
            RuntimeError: the weights are perturbed, so that a checkpoint taken now would hold perturbed weights.
        """
        self._refuse_perturbed("state_dict() was called")
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of SAM or of the bare base optimizer, whose groups keep SAM's options as they are.

        Floating-point state keeps the dtype that it was saved with.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError, TypeError: not an optimizer's state_dict, or one of other parameters; nothing is loaded then.
        """
        self._refuse_perturbed("load_state_dict() was called")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes an optimizer's state_dict, not {type(state_dict).__name__}")
        checked: dict[str, Any] = {}

        def check(_: Optimizer, adapted: Mapping[str, Any]) -> dict[str, Any]:
            checked.update(check_state_dict(adapted, self.param_groups))
            for k, group in enumerate(checked["param_groups"]):
                _check_options(group, k)
            return checked

        last = self.register_load_state_dict_pre_hook(check)  # after hooks of the user's, which may adapt it
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            last.remove()
        keep_numbers(self, checked)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("the optimizer was copied or pickled")
        return {
            **super().__getstate__(),
            "_eps": self._eps,
            "_backend_name": self._backend_name,
            "_check_update": self._check_update,
            "_base_class": self._base_class,
            "_base_options": self._base_options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if "_base_class" in state:  # a copy or an unpickled optimizer; load_state_dict() brings state and groups alone
            self._backend = backends.choose(self._backend_name, self._device())
            self._base = make_base(self._base_class, self, self._base_options)
            self._plan = Plan(self.param_groups, self._backend)
        elif self._plan is not None:
            self._plan.forget_state()

    # ---- within -------------------------------------------------------------------------------------------

    _backend: Backend
    _plan: Plan | None = None
    _perturbed: list[Job] | None = None  # what first_step() perturbed; None: it was not called
    _took_update_norm = False
    _numbers: Tensor | None = None
    _host_numbers: array[float] | None = None  # the same memory, where it is the host's: read without a call into torch

    def _forget(self) -> None:
        self._perturbed = None
        self._numbers = None
        self._host_numbers = None

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
            if device.type == "cpu":
                self._host_numbers = array("d", bytes(8 * STATUS_SIZE))
                self._numbers = torch.frombuffer(self._host_numbers, dtype=status_dtype(device))
            else:
                self._host_numbers = None
                self._numbers = torch.zeros(STATUS_SIZE, dtype=status_dtype(device), device=device)
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
            _check_options(group, k)
            raise
        if not (0 <= numbers.rho < math.inf and 0 <= numbers.eta < math.inf):
            _check_options(group, k)
        return numbers

    def _perturbs(self, groups: list[Group]) -> bool:
        return any(g.rho > 0 and group["perturb"] for g, group in zip(groups, self.param_groups, strict=True))

    def _planned(self) -> Plan:
        """The plan, made anew if parameters were added, exchanged or moved."""
        plan = self._plan
        if plan is None or not plan.holds(self.param_groups):
            device = self._device()
            if plan is not None and plan.params and plan.params[0].device != device:
                self._backend = backends.choose(self._backend_name, device)
            fresh = Plan(self.param_groups, self._backend)
            if plan is not None and self._perturbed is not None:
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
        return plan, scan

    def _norm(self, jobs: list[Job], groups: list[Group], *, scaled: bool, carry: bool = False) -> None:
        """P1 over all tables."""
        status = self._status()
        if not jobs:
            status.zero_()
        for i, job in enumerate(jobs):
            first, last = i == 0, i == len(jobs) - 1
            job.backend.norm(
                job.table, groups, status, scaled=scaled, carry=carry, begin=first, finish=last, eps=self._eps
            )

    def _step(self) -> None:
        """Update with the gradients as they are, undoing the perturbation if there is one."""
        try:
            groups = self._groups()
            plan, scan = self._scan()
            status = self._status()
            undo = plan.nothing if self._perturbed is None else self._perturbed
            update = plan.update(scan, undo, self._base.with_momentum(groups), self.state)
            with attached(update.jobs, scan):
                self._judge(update.jobs, groups, carry=self._perturbed is not None)
                self._base.step(update, scan, groups, status, getattr(self, "grad_scale", None))
            if not self._known_skip():
                update.commit(self.state)
        except BaseException:
            self.restore()
            raise
        self._perturbed = None
        mark_used(scan.present())

    def _judge(self, jobs: list[Job], groups: list[Group], *, carry: bool) -> None:
        """Set SKIP where this update's gradients are not finite; carry: or where the first ones were not."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self._took_update_norm = found_inf is None and self._check_update
        if self._took_update_norm:
            self._norm(jobs, groups, scaled=False, carry=carry)
            return
        skip = self._status()[SKIP : SKIP + 1]
        if not carry:
            skip.fill_(0)
        if found_inf is not None:  # GradScaler has looked at every gradient; never negative, and not 0 skips
            skip.add_(found_inf.reshape(1).to(skip, non_blocking=True))

    def _refuse_perturbed(self, what: str) -> None:
        if self._perturbed is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), where the weights are perturbed: "
                "call second_step() to finish the step, or restore() to undo it, first"
            )


def _is_number(x: Any) -> bool:
    return x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, Real) and not isinstance(x, bool)


def _check_options(group: dict[str, Any], k: int) -> None:
    """Raise ValueError or TypeError for SAM's options of group k that are out of range."""
    for name in ("rho", "eta"):
        value = group[name]
        if not _is_number(value):
            raise TypeError(f"{name} of group {k} must be a number, not {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} of group {k} must be a finite number of 0 or more, not {value!r}")
    for name in ("adaptive", "perturb"):
        if isinstance(group[name], str) or group[name] not in (False, True):
            raise TypeError(f"{name} of group {k} must be True or False, not {group[name]!r}")
