"""Stable-SAM: SAM's gradient, rescaled to the length of the gradient at w.

    w = BASE(w, (||g|| / ||g_s||) g_s)
"""

from __future__ import annotations

import torch

from fused_sam.sam import SAM
from fused_sam.step import Step


class StableSAM(SAM):
    """Zhou et al., "Stable-SAM", arXiv 2401.07250: SAM's direction with the step length of the base optimizer.

    Use it with plain SGD if SAM is unstable at learning rates that the base optimizer bears. Base optimizers that
    divide by the gradient's size, such as Adam, hardly differ from SAM with it.

    Options: SAM's, without adaptive. Both norms are over the gradients of perturbed groups; those of groups with
    perturb=False are rescaled by the same factor. A second gradient of 0 is left as it is. Under a GradScaler the
    rescaled gradient is checked too, and scaler.unscale_() between the passes needs
    first_step(grad_scale=scaler.get_scale()).

    Raises:
        ValueError: a group with adaptive=True, whose norm is that of T g; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 64: norm 4, perturb 16, norm of g_s 8, scaling 12, check 4, update 20 | 6 | 2 |
    """

    def ascent(self, step: Step) -> None:
        for k, group in enumerate(step.groups):
            if group["adaptive"] and group["perturb"]:
                raise ValueError(f"StableSAM compares the norms of both gradients: set adaptive=False in group {k}")

    def descent(self, step: Step) -> None:
        if step.perturbed:
            perturbed = [step.grad.group(k) for k, group in enumerate(step.groups) if group["perturb"]]
            norm = torch.stack([x.dot(x) for x in perturbed]).sum().sqrt()
            step.grad.scale_(torch.where(norm > 0, step.ascent_norm / norm, 1.0))
