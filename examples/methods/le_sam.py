"""LE-SAM (arXiv 2605.10183): a perturbation whose length falls with the gradient's norm, and over training.

    ||e|| = min(sigma_t / ||g||, rho_max),  sigma_t = sigma (1 + cos(pi t / T)) / 2
"""

import math

import torch

from fused_sam import SAM, Step, option


class LESAM(SAM):
    """SAM with a length of its own instead of rho. Options: sigma, rho_max, total (T, in steps), and SAM's."""

    OPTIONS = {"sigma": option(0.05, low=0), "rho_max": option(0.1, low=0), "total": option(10_000, low=1)}
    GROUP_STATE = {"lesam_step": 0}
    sigma: float
    rho_max: float
    total: int

    def radius(self, step: Step) -> torch.Tensor:
        share = min(1.0, step.groups[0]["lesam_step"] / self.total)
        sigma = self.sigma * (1 + math.cos(math.pi * share)) / 2
        return (sigma / step.ascent_norm).clamp(max=self.rho_max)

    def updated(self, step: Step) -> None:
        for group in step.groups:
            group["lesam_step"] += 1
