"""Precond-SAM: the perturbation is preconditioned by Adam's second moment.

    T = (sqrt(v_hat) + eps)^(-1/2);  e = rho T^2 g / ||T g||;  w = ADAM(w, grad L(w + e))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import ADAM
from fused_sam.sam import SAM
from fused_sam.step import Step


class PrecondSAM(SAM):
    """Singh, Mobahi, Agarwala and Dauphin, "Avoiding spurious sharpness minimization", ICML 2025, arXiv 2502.02407.

    Use it for language models that Adam or AdamW trains. Published: above AdamW at equal numbers of steps, where plain
    SAM is below it.

    Args:
        base_optimizer: torch.optim.AdamW or Adam. v_hat and eps are its own: the second moment without its bias, as
            the last update left it (with amsgrad the largest so far).
        rho: the length of e in the norm that T defines: ||e / T|| = rho. sqrt(v_hat) is in units of the gradient, so
            that a good rho depends on the loss; 0.05 is SAM's default.
        Others: as SAM, except for `adaptive` and `eta`.

    Before Adam has a second moment there is no T. The first step is therefore Adam's own, in one pass, and
    `needs_second_pass` is False; a loaded checkpoint of Adam brings the second moments. A weight that gets its first
    gradient later is not perturbed in that step.

    Under a GradScaler nothing needs care: e does not depend on the loss scale.

    Raises:
        TypeError: a base optimizer that is not torch.optim.Adam or AdamW.
        ValueError: a group with adaptive=True, or with Adam's eps at 0; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 60: norm 8, perturb 20, check 4, update 28 | 5, and about 20 over one number per tensor | 2 |
    """

    preconditions = True
    needs_grad_scale = False

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.AdamW, *args: Any, **options: Any
    ) -> None:
        super().__init__(params, base_optimizer, *args, **options)
        base = self.stepper.base
        if base.rule is not ADAM:
            raise TypeError(
                f"PrecondSAM needs torch.optim.AdamW or Adam, whose second moment it reads, not {base.cls.__name__}"
            )
        self.stepper.check_preconditioned()

    def wants_perturbation(self, step: Step) -> bool:
        return any("exp_avg_sq" in entry for entry in self.state.values())
