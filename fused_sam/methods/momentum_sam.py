"""Momentum-SAM: the weights stand displaced along the momentum while the gradient is taken; one pass a step.

    stored: w~ = w - rho v / ||v||
    g = grad L(w~);  w = w~ + rho v / ||v||;  v = mu v + g;  w = w - lr v;  w~ = w - rho v / ||v||
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from fused_sam.backends.contract import DRAWS, NORM, Group
from fused_sam.engine.calls import Scan, attached
from fused_sam.engine.plan import Plan
from fused_sam.sam import SAM

_MOMENTA = ("momentum_buffer", "exp_avg")
_NOTHING: dict[str, Any] = {}


class MomentumSAM(SAM):
    """Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv 2401.12033
    ("MSAM" there; mSAM is another method). v is SGD's momentum_buffer, or Adam's exp_avg.

    Args:
        rho: length of the displacement along -v, 3 by default: larger than SAM's; 0.3, 1 and 3 are worth a try.
        Others: as SAM. The base optimizer must be torch.optim.SGD with momentum, Adam or AdamW. A schedule decides
            after a step whether the next gradient is taken from displaced weights; it cannot be one that looks at
            gradients.

    An ordinary loop trains it: backward(), step(); `perturbs` is always False. Between steps the stored weights are w~.
    eval() restores w, bit for bit, before evaluating, saving or copying, and train() displaces them again;
    `with optimizer.unperturbed():` does both. state_dict(), copying and pickling raise an error while the weights are
    displaced; after loading, call train(). guard(model) lets a forward pass in eval mode raise one.

    Use it where a second pass cannot be paid. Published: low sharpness without significant overhead over SGD or Adam.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: P1 4, P3 20 with the undo, P1 of v 4, P2 16 | 4 | 1 |

    Raises:
        ValueError: a perturbed group without momentum; a schedule that looks at gradients; as SAM.
        TypeError: another base optimizer.
        RuntimeError: first_step(), second_step(), or step() with clean weights where there is momentum.
    """

    _copied = (*SAM._copied, "_training")
    _knows_two_steps = True  # its whole step is one pass
    _carries_skip = False
    _training = True
    _ready = False  # whether the coming step's displacement was decided, and made if it was to be
    _shift_status: Tensor | None = None
    _sorted: tuple[Plan, list[Any], Scan] | None = None  # momentum as it was found last

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 3.0,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if getattr(options.get("schedule"), "needs_gradients", False):
            raise ValueError(
                "MomentumSAM displaces before there are gradients: use a schedule that does not look at them"
            )
        super().__init__(params, base_optimizer, rho, adaptive, **options)
        if not self._base.fused:
            raise TypeError(f"MomentumSAM needs torch.optim.SGD, Adam or AdamW, not {base_optimizer.__name__}")
        for k in range(len(self.param_groups)):
            self._check_momentum(k)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._plan is not None:
            try:
                self._check_momentum(len(self.param_groups) - 1)
            except ValueError:
                del self.param_groups[-1]
                raise

    def _check_momentum(self, k: int) -> None:
        group = self.param_groups[k]
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        if group["perturb"] and momentum == 0:
            raise ValueError(
                f"group {k} has no momentum to displace its weights along: set momentum=0.9 (Adam: betas[0] above 0), "
                "or perturb=False"
            )

    # ---- displaced and clean --------------------------------------------------------------------------------

    @property
    def displaced(self) -> bool:
        """Whether the stored weights are the displaced ones."""
        return self._perturbed is not None

    @property
    def perturbed(self) -> bool:
        """Always False: no step is left half done."""
        return False

    @property
    def perturbs(self) -> bool:
        """Always False: no step makes a second pass."""
        return False

    @property
    def grad_norm(self) -> Tensor:
        """||T v||, the global norm of the momentum that the weights were displaced along last: 0-dim."""
        return self._status()[NORM].clone() if self._shift_status is None else self._shift_status[NORM].clone()

    @torch.no_grad()
    def eval(self) -> None:
        """The clean weights, bit for bit: for evaluating, saving and copying. train() goes back."""
        self._to_clean()
        self._training = self._ready = False

    @torch.no_grad()
    def train(self) -> None:
        """Displaced weights, where there is momentum: for training."""
        self._refuse_misuse("train()")
        self._training = True
        if self._perturbed is None:
            self._displace()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as the last step left them: nothing to undo between steps."""
        if self._perturbed is not None:
            self._to_clean()
            self._displace()

    def _to_clean(self) -> None:
        displaced = self._perturbed is not None
        super().restore()
        if displaced and self._random(()):  # displacing again is to draw what this displacement drew, the last draw
            self._status()[DRAWS].sub_(1).remainder_(2**24)

    def _count_draws(self) -> None:
        """As SAM's; within unperturbed() without the displacement's, which train() makes again on loading."""
        super()._count_draws()
        if self._lent and "draws" in self._own_options:
            for group in self.param_groups:
                group["draws"] = (group["draws"] - 1) % 2**24

    def guard(self, model: nn.Module) -> RemovableHandle:
        """Let model's forward raise RuntimeError in eval mode while the weights are displaced; .remove() takes it
        away."""

        def check(module: nn.Module, _: Any) -> None:
            if not module.training and self.displaced:
                raise RuntimeError(
                    "the model is in eval mode and its weights are displaced: call optimizer.eval() before "
                    "evaluating and optimizer.train() afterwards, or evaluate within `with optimizer.unperturbed():`"
                )

        return model.register_forward_pre_hook(check)

    # ---- the step -------------------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool = False) -> None:
        """There is none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("MomentumSAM takes one pass: call step() after backward(), without first_step()")

    def second_step(self, zero_grad: bool = False) -> None:
        """There is none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("MomentumSAM takes one pass: call step() after backward(), without second_step()")

    def _whole_step(self, closure: Callable[..., Any] | None) -> Any:
        if not self._ready and self._has_momentum():
            raise RuntimeError(
                "step() was called with clean weights, whose gradients are not Momentum-SAM's: call optimizer.train() "
                "after eval() and after load_state_dict(), before the forward pass"
            )
        loss = None
        if closure is not None:
            self.zero_grad()
            loss = torch.enable_grad()(closure)()
        self._step()
        return loss

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        if self._training:
            self._displace()

    def _has_momentum(self) -> bool:
        return any(name in entry for entry in self.state.values() for name in _MOMENTA)

    def _displace(self) -> None:
        """From clean weights to displaced ones, where a group has rho and the schedule wants it: P1 and P2 along -v."""
        self._ready = True
        groups = [g._replace(rho=-g.rho) for g in self._groups()]
        if all(g.rho == 0 for g in groups) or not self._due() or not self._has_momentum():
            return
        plan = self._planned()
        scan = self._momenta(plan, groups)
        jobs = plan.perturbation(scan, self._takes_part(), self.state)
        if not jobs:
            return
        if self._shift_status is None or self._shift_status.device != self._status().device:
            self._shift_status = torch.zeros_like(self._status())
        status = self._shift_status
        if self._random(groups):
            status[DRAWS] = self._status()[DRAWS]
        with attached(jobs, scan):
            # Numbers of its own: whether the update was skipped is still to be read, and a skipped one is displaced
            # too.
            self._norm(plan, jobs, scan, groups, scaled=True, carry=False, status=status)
            for job in jobs:
                job.backend.perturb(job.table, groups, status)
        self._perturbed = jobs
        self._drew(groups)
        self._wrote()

    def _momenta(self, plan: Plan, groups: list[Group]) -> Scan:
        """The momentum of every weight that has any; sorted anew only where other tensors hold it."""
        needs = self._base.needs(groups)
        names = [next((n for n in needs[k] if n in _MOMENTA), "") for k in plan.group_of]
        held = [self.state.get(p, _NOTHING).get(n) for p, n in zip(plan.owners, names, strict=True)]
        if self._sorted is None or self._sorted[0] is not plan or not all(map(operator.is_, held, self._sorted[1])):
            parts = [plan.state_part(self.state, i, n, begin=False) for i, n in enumerate(names)]
            held = [self.state.get(p, _NOTHING).get(n) for p, n in zip(plan.owners, names, strict=True)]
            self._sorted = plan, held, plan.scan_of(parts)
        return self._sorted[2]

    def _refuse_perturbed(self, what: str) -> None:
        if self._perturbed is not None:
            raise RuntimeError(
                f"{what} while the weights are displaced along the momentum: call optimizer.eval() first, and "
                "optimizer.train() afterwards"
            )

    def _forget(self) -> None:
        super()._forget()
        self._ready = False
        self._shift_status = self._sorted = None
