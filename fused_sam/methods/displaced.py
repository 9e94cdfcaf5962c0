"""Methods of one pass: the weights stand displaced by e while the gradient is taken, and e is known before the step.

    stored: w~ = w + e;  g = grad L(w~);  w = w~ - e;  w = BASE(w, g);  w~ = w + (the next e)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.engine.base_optimizers import WrappedBase
from fused_sam.engine.displacement import Displacement
from fused_sam.engine.stepper import Stepper
from fused_sam.sam import SAM
from fused_sam.step import Number, Step


class DisplacedSAM(SAM):
    """What the methods of one pass have in common. A subclass gives its `make_displacement` and `displaced_by`.

    An ordinary loop trains it: backward(), step(); `needs_second_pass` is always False. The first step is the base
    optimizer's. Between steps the stored weights are w~. eval() restores w, bit for bit, before evaluating, saving or
    copying, and train() displaces them again; `with optimizer.unperturbed():` does both. state_dict(), copying and
    pickling raise an error while the weights are displaced. After loading, call train(). guard(model) makes evaluating
    and saving the model raise one. A schedule decides after a step whether the next gradient is taken from displaced
    weights; it cannot be one that reads gradients.
    """

    skips_with_ascent = False

    training: bool = True
    """True between train() and eval()."""

    clean_between_steps: bool = False
    """True: a step leaves the clean weights, and train() displaces them before each forward pass. For frameworks that
    evaluate, average or save between any two steps; it costs nothing."""

    displaced_by: str = ""
    """What the weights are displaced by, for errors."""

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        name = type(self).__name__
        if getattr(options.get("schedule"), "needs_gradients", False):
            raise ValueError(f"{name} displaces before there are gradients: use a schedule that does not read them")
        if options.get("decay_in_ascent"):
            raise ValueError(f"{name} has no ascent gradient that decay_in_ascent=True could change: leave it out")
        super().__init__(params, base_optimizer, *args, **options)
        base = self.stepper.base
        if isinstance(base, WrappedBase) and base.modes():
            raise TypeError(
                f"{base.cls.__name__} has train() or eval() of its own, which {name} needs for its displaced weights: "
                "use another base optimizer"
            )

    def make_displacement(self, stepper: Stepper) -> Displacement:
        """Return what displaces the weights between steps."""
        raise NotImplementedError(f"{type(self).__name__} must define make_displacement()")

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
        """||T v||, the global norm of the vector that the weights were displaced along last: 0-dim."""
        status = self.stepper.displacement.status or self.stepper.status
        return status.ascent_norm.clone()

    def eval(self) -> None:
        """Restore the clean weights, bit for bit: for evaluating, saving and copying. train() goes back."""
        self.refuse_suspended("eval()")
        displacement = self.stepper.displacement
        displacement.restore()
        self.training = displacement.ready = False

    def train(self) -> None:
        """Displace the weights, if there is something to displace them by: for training."""
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
        name = type(self).__name__
        raise RuntimeError(f"{name} takes one pass: call step() after backward(), without first_step()")

    def second_step(self, zero_grad: bool = False) -> None:
        """Raise RuntimeError: there is no second step."""
        name = type(self).__name__
        raise RuntimeError(f"{name} takes one pass: call step() after backward(), without second_step()")

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        displacement = self.stepper.displacement
        if not displacement.ready and displacement.begun():
            raise RuntimeError(
                f"step() was called with clean weights, whose gradients are not those of {type(self).__name__}: call "
                "optimizer.train() after eval() and after load_state_dict(), before the forward pass"
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
                f"{what} while the weights are displaced {self.displaced_by}: call optimizer.eval() first, and "
                "optimizer.train() afterwards, or do this inside `with optimizer.unperturbed():`"
            )
