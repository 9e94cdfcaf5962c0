"""Momentum-SAM: the weights stand displaced against the momentum while the gradient is taken; one pass per step.

    stored: w~ = w - rho v / ||v||
    g = grad L(w~);  w = w~ + rho v / ||v||;  v = mu v + g;  w = w - lr v;  w~ = w - rho v / ||v||
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.engine.base_optimizers import fused_names
from fused_sam.engine.displacement import AgainstMomentum
from fused_sam.engine.stepper import Stepper
from fused_sam.step import Step, option

from .displaced import DisplacedSAM


class MomentumSAM(DisplacedSAM):
    """Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv 2401.12033.

    Called "MSAM" there; mSAM is another method. v is the base optimizer's momentum: SGD's momentum_buffer, the exp_avg
    of Adam and Lion. Use it if a second pass cannot be paid. Published: low sharpness without significant overhead over
    SGD or Adam.

    Args:
        rho: length of the displacement along -v, larger than SAM's. 3 is that of the authors' runs; their class
            has 0.3.
        authors_decay: False: the base optimizer's own weight decay, of the clean weights. True: as in the authors'
            program, for SGD and AdamW. SGD's decay is a part of the gradient and of the displaced weights; AdamW's
            comes after the update. Gradients are changed in place then.
        Others: as SAM. The base optimizer must be a fused one, SGD with momentum. A schedule decides after a step
            whether the next gradient is taken from displaced weights; it cannot be one that reads gradients.

    An ordinary loop trains it: backward(), step(); `needs_second_pass` is always False. Between steps the stored
    weights are w~. eval() restores w, bit for bit, before evaluating, saving or copying, and train() displaces them
    again; `with optimizer.unperturbed():` does both. state_dict(), copying and pickling raise an error while the
    weights are displaced. After loading, call train(). guard(model) makes evaluating and saving the model raise one.

    The authors' program takes one parameter group, and its SGD has no dampening and ignores nesterov.

    Raises:
        ValueError: a perturbed group without momentum; a schedule that reads gradients; authors_decay with
            stochastic_rounding; as SAM.
        TypeError: a base optimizer that is not fused; authors_decay with another one than SGD and AdamW.
        RuntimeError: first_step(), second_step(), or step() with clean weights although there is momentum.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: check 4, update 20 with the undo, norm of v 4, perturb 16 | 4 | 1 |
    | with authors_decay | 56: the decay 12 | 4, and 2 per tensor (SGD) or 1 per group (AdamW) | 1 |
    """

    OPTIONS = {"authors_decay": option(False, fixed=True, help="weight decay as in the authors' program")}
    authors_decay: bool
    DEFAULTS = {"rho": 3.0}
    displaced_by = "along the momentum"

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        super().__init__(params, base_optimizer, *args, **options)
        base = self.stepper.base
        if base.rule is None:
            raise TypeError(f"MomentumSAM needs {fused_names()}, not {base.cls.__name__}")
        if self.authors_decay:
            if base.cls not in (torch.optim.SGD, torch.optim.AdamW):
                raise TypeError(
                    f"authors_decay=True is for SGD and AdamW, which the authors' program has, not {base.cls.__name__}"
                )
            if options.get("stochastic_rounding"):
                raise ValueError("authors_decay=True writes gradients or weights a second time: use master_weights")
        for k in range(len(self.param_groups)):
            self.check_momentum(k)

    @property
    def applies_decay(self) -> bool:  # type: ignore[override]
        """True if the update is to leave out the weight decay."""
        return self.authors_decay

    def make_displacement(self, stepper: Stepper) -> AgainstMomentum:
        return AgainstMomentum(stepper)

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

    def descent(self, step: Step) -> None:
        if self.authors_decay and self.stepper.base.cls is torch.optim.SGD:
            scale = 1.0 if step.grad_scale is None else step.grad_scale
            for k, group in enumerate(step.groups):
                sign = -1.0 if group["maximize"] else 1.0
                if group["weight_decay"] != 0:
                    for p, g in step.grad.group(k).items():
                        wide = torch.promote_types(p.dtype, torch.float32)
                        g.add_(p.detach().to(wide) * (sign * group["weight_decay"] * scale))

    def updated(self, step: Step) -> None:
        if self.authors_decay and self.stepper.base.cls is torch.optim.AdamW:
            for k, group in enumerate(step.groups):
                if group["weight_decay"] != 0:
                    step.weights.within(step.grad).group(k).scale_(1 - group["lr"] * group["weight_decay"])
        super().updated(step)
