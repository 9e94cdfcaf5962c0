"""LE-SAM, "loss-equated": the length of the perturbation is such that the loss rises by sigma, to first order.

    ||e|| = min(sigma_t / ||g||, rho_max);  w = BASE(w, grad L(w + e))
    sigma_t grows from 0 to sigma over the warm-up, and falls to 0 by a cosine after decay_start
"""

from __future__ import annotations

import math
from typing import Any

from fused_sam.sam import SAM
from fused_sam.step import REQUIRED, Step, option


class LESAM(SAM):
    """Wang, Liu, Xie and Gao, "Fix the Loss, Not the Radius", ICML 2026, arXiv 2605.10183.

    Use it if SAM's rho is hard to choose because gradients change in length over training. Published: above SAM and its
    variants on CIFAR with several networks.

    Args:
        total: the number of steps of the training, which warmup and decay_start are shares of.
        sigma: the budget in units of the loss; 0.35 in the authors' program, for ResNet-18 on CIFAR-100.
        rho_max: the largest ||e||; 0.3 is the default of the authors' program, whose example sets none (999).
        warmup: share of the steps over which sigma_t grows from 0; 10 of 200 epochs in the authors' program.
        decay_start: share of the steps after which sigma_t falls; 160 of 200 epochs in the authors' program.
        Others: as SAM. rho says only which groups are perturbed: those with rho above 0. With adaptive=True ||e|| is
            the length of e / T. Under a GradScaler pass the scale with every step where first_step() is called by hand:
            first_step(grad_scale=scaler.get_scale()).

    Differs from the authors' program: sigma_t changes with every step, there with every epoch. A skipped step is
    counted.

    Raises:
        TypeError, ValueError: total is missing, an option out of range; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: norm 4, perturb 16, check 4, update 20 | 4 | 2 |
    """

    OPTIONS = {
        "total": option(REQUIRED, low=1, type=int, help="the number of steps of the training"),
        "sigma": option(0.35, low=0, help="by how much the loss is to rise"),
        "rho_max": option(0.3, low=0, open_low=True, help="the largest length of the perturbation"),
        "warmup": option(0.05, low=0, high=1, help="share of the steps over which sigma grows"),
        "decay_start": option(0.8, low=0, high=1, open_high=True, help="share of the steps after which sigma falls"),
    }
    total: int
    sigma: float
    rho_max: float
    warmup: float
    decay_start: float
    GROUP_STATE = {"lesam_step": 0}

    def radius(self, step: Step) -> Any:
        return (self.budget(step.groups[0]["lesam_step"]) / step.ascent_norm).clamp(max=self.rho_max)

    def budget(self, step: int) -> float:
        """Return sigma_t of a step."""
        done = min(1.0, step / self.total)
        grown = min(1.0, done / self.warmup) if self.warmup > 0 else 1.0
        falling = max(0.0, done - self.decay_start) / (1 - self.decay_start)
        return self.sigma * grown * (1 + math.cos(math.pi * falling)) / 2

    def updated(self, step: Step) -> None:
        for group in step.groups:
            group["lesam_step"] += 1
