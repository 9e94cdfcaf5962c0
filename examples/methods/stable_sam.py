"""Stable-SAM (Zhou et al., arXiv 2401.07250): SAM's gradient, rescaled to the length of the gradient at w.

    w = BASE(w, (||g|| / ||g_s||) g_s)
"""

from fused_sam import SAM, Step


class StableSAM(SAM):
    """SAM with the second gradient scaled to the first one's norm, over perturbed groups. Options: SAM's."""

    def descent(self, step: Step) -> None:
        if step.perturbed:
            step.grad.scale_(step.ascent_norm / step.grad.norm().clamp(min=1e-30))
