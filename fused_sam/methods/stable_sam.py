"""Stable-SAM: SAM's gradient, rescaled to the length of the gradient at w.

    w = BASE(w, (||g|| / ||g_s||) g_s)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam.sam import SAM
from fused_sam.step import Step


class StableSAM(SAM):
    """Zhou et al., "Stable-SAM", arXiv 2401.07250: SAM's direction with the step length of the base optimizer.

    Use it with plain SGD if SAM is unstable at learning rates that the base optimizer bears. Base optimizers that
    divide by the gradient's size, such as Adam, hardly differ from SAM with it.

    Options: SAM's. Both norms are over the gradients of perturbed groups; those of groups with
    perturb=False are rescaled by the same factor. A second gradient of 0 is left as it is. Under a GradScaler the
    rescaled gradient is checked too, and scaler.unscale_() between the passes needs
    first_step(grad_scale=scaler.get_scale()). So do adaptive groups, for which ||g|| is taken by itself (8 bytes).

    Raises:
        As SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 64: norm 4, perturb 16, norm of g_s 8, scaling 12, check 4, update 20 | 6 | 2 |
    """

    first_norm: Any = None
    """||g|| between `ascent` and `descent`, if a group is adaptive."""

    def ascent(self, step: Step) -> None:
        adaptive = any(group["adaptive"] and group["perturb"] for group in step.groups)
        self.first_norm = norm_of_perturbed(step) if adaptive else None  # else it is ascent_norm

    def descent(self, step: Step) -> None:
        first, self.first_norm = self.first_norm, None
        if step.perturbed:
            second = norm_of_perturbed(step)
            step.grad.scale_(torch.where(second > 0, (step.ascent_norm if first is None else first) / second, 1.0))


def norm_of_perturbed(step: Step) -> Tensor:
    """Return the norm of this pass's gradients over the perturbed groups: 0-dim."""
    perturbed = [step.grad.group(k) for k, group in enumerate(step.groups) if group["perturb"]]
    return torch.stack([x.dot(x) for x in perturbed]).sum().sqrt()
