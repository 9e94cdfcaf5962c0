"""Momentum-SAM: the weights stand displaced against the momentum while the gradient is taken; one pass per step.

    stored: w~ = w - rho v / ||v||
    g = grad L(w~);  w = w~ + rho v / ||v||;  v = mu v + g;  w = w - lr v;  w~ = w - rho v / ||v||
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.engine.base_optimizers import fused_names
from fused_sam.sam import SAM
from fused_sam.step import Number, Step


class MomentumSAM(SAM):
    """Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv 2401.12033.

    Called "MSAM" there; mSAM is another method. v is the base optimizer's momentum: SGD's momentum_buffer, the exp_avg
    of Adam and Lion. Use it if a second pass cannot be paid. Published: low sharpness without significant overhead over
    SGD or Adam.

    Args:
        rho: length of the displacement along -v, larger than SAM's. 3 is that of the authors' runs; their class
            has 0.3.
        Others: as SAM. The base optimizer must be a fused one, SGD with momentum. A schedule decides after a step
            whether the next gradient is taken from displaced weights; it cannot be one that reads gradients.

    An ordinary loop trains it: backward(), step(); `needs_second_pass` is always False. Between steps the stored
    weights are w~. eval() restores w, bit for bit, before evaluating, saving or copying, and train() displaces them
    again; `with optimizer.unperturbed():` does both. state_dict(), copying and pickling raise an error while the
    weights are displaced. After loading, call train(). guard(model) makes evaluating and saving the model raise one.

    Raises:
        ValueError: a perturbed group without momentum; a schedule that reads gradients; as SAM.
        TypeError: a base optimizer that is not fused.
        RuntimeError: first_step(), second_step(), or step() with clean weights although there is momentum.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: check 4, update 20 with the undo, norm of v 4, perturb 16 | 4 | 1 |
    """

    DEFAULTS = {"rho": 3.0}
    skips_with_ascent = False

    training: bool = True
    """True between train() and eval()."""

    clean_between_steps: bool = False
    """True: a step leaves the clean weights, and train() displaces them before each forward pass. For frameworks that
    evaluate, average or save between any two steps; it costs nothing."""

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        if getattr(options.get("schedule"), "needs_gradients", False):
            raise ValueError(
                "MomentumSAM displaces before there are gradients: use a schedule that does not read them"
            )
        super().__init__(params, base_optimizer, *args, **options)
        if self.stepper.base.rule is None:
            base = self.stepper.base.cls.__name__
            raise TypeError(f"MomentumSAM needs {fused_names()}, not {base}")
        for k in range(len(self.param_groups)):
            self.check_momentum(k)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; as SAM's, but it must have momentum."""
        super().add_param_group(param_group)
        if {"momentum", "betas"} & self.param_groups[-1].keys():  # not there yet while the optimizer is constructed
            try:
                self.check_momentum(len(self.param_groups) - 1)
            except ValueError:
                del self.param_groups[-1]
                raise

    def check_momentum(self, k: int) -> None:
        """Raise ValueError if group k is perturbed and has no momentum."""
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
        """True if the stored weights are the displaced ones."""
        return self.stepper.perturbed is not None

    @property
    def perturbed(self) -> bool:
        """Always False: no step is left half done."""
        return False

    @property
    def needs_second_pass(self) -> bool:
        """Always False: no step makes a second pass."""
        return False

    @property
    def grad_norm(self) -> Tensor:
        """||T v||, the global norm of the momentum that the weights were displaced along last: 0-dim."""
        status = self.stepper.displacement.status or self.stepper.status
        return status.ascent_norm.clone()

    def eval(self) -> None:
        """Restore the clean weights, bit for bit: for evaluating, saving and copying. train() goes back."""
        self.refuse_suspended("eval()")
        displacement = self.stepper.displacement
        displacement.restore()
        self.training = displacement.ready = False

    def train(self) -> None:
        """Displace the weights, if there is momentum: for training."""
        self.refuse_suspended("train()")
        self.training = True
        if self.displaced:
            self.stepper.displacement.ready = True
        else:
            self.displace()

    def restore(self) -> None:
        """Restore the weights as the last step left them: there is nothing to undo between steps."""
        self.refuse_suspended("restore()")
        if self.displaced:
            self.stepper.displacement.restore()
            self.displace()

    def displace(self) -> None:
        """Displace clean weights, unless the schedule leaves the coming step out."""
        self.stepper.displacement.displace(wanted=self.stepper.wants_perturbation())

    # ---- the step -------------------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool = False, *, grad_scale: Number | None = None) -> None:
        """Raise RuntimeError: there is no first step."""
        raise RuntimeError("MomentumSAM takes one pass: call step() after backward(), without first_step()")

    def second_step(self, zero_grad: bool = False) -> None:
        """Raise RuntimeError: there is no second step."""
        raise RuntimeError("MomentumSAM takes one pass: call step() after backward(), without second_step()")

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        displacement = self.stepper.displacement
        if not displacement.ready and displacement.has_momentum():
            raise RuntimeError(
                "step() was called with clean weights, whose gradients are not Momentum-SAM's: call optimizer.train() "
                "after eval() and after load_state_dict(), before the forward pass"
            )
        loss = None
        self.stepper.plain_step_warning_off = True
        if closure is not None:
            self.zero_grad()
            loss = self.evaluating(closure)()
        super().run_step(None)
        return loss

    def updated(self, step: Step) -> None:
        if self.training and not self.clean_between_steps:
            self.displace()
        else:
            self.stepper.displacement.ready = False

    def refuse_perturbed(self, what: str) -> None:
        if self.displaced:
            raise RuntimeError(
                f"{what} while the weights are displaced along the momentum: call optimizer.eval() first, and "
                "optimizer.train() afterwards, or do this inside `with optimizer.unperturbed():`"
            )
