"""LookSAM: SAM's second pass in every k-th step; between them, the part of its gradient that changes slowly is reused.

    t % k == 0:  g, g_s as SAM;  g_v = g_s - (<g, g_s> / ||g||^2) g, kept;  w = BASE(w, g_s)
    else:        g alone;        w = BASE(w, g + alpha (||g|| / ||g_v||) g_v)
"""

from __future__ import annotations

import torch

from fused_sam.sam import SAM
from fused_sam.step import Step, option


class LookSAM(SAM):
    """Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714.

    Use it in long runs, where SAM's price counts. Published: SAM's gain in accuracy at a cost near the base
    optimizer's, for ViTs on ImageNet.

    Args:
        k: two passes in every k-th step, the first one included; 5 in the paper.
        alpha: 0 to 1, how much of the kept direction is added; 0.7 for ViT; smaller values, 0.1 to 0.3, are used on
            CIFAR.
        Others: as SAM. Steps that a schedule leaves out are the base optimizer's own and are not counted; a skipped
            step is counted.

    g_v is "sharpness_direction" in the state. A step without one, such as the first after loading another optimizer's
    checkpoint, is a SAM step. The direction has no scale, so a GradScaler needs no care. Norms are global, over the
    weights that have both a gradient and a direction. first_step() takes the gradients from the parameters. Under a
    GradScaler the combined gradient is checked too. The scaler does not lower its scale for such a step.

    Raises:
        TypeError, ValueError: k or alpha out of range; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every k-th step | 64: norm 4, perturb 16, check 4, update 20, dot 8, axpby 12 | 6 | 2 |
    | between | 44: dot 8, axpby 12, check 4, update 20 | 4 | 1 |

    Memory on top of SAM's: 4 bytes for g_v; 4 more for g during the second pass.
    """

    OPTIONS = {
        "k": option(5, low=1, help="two passes in every k-th step"),
        "alpha": option(0.7, low=0, high=1, help="weight of the kept direction between"),
    }
    k: int
    alpha: float
    GROUP_STATE = {"looksam_step": 0}
    keeps_ascent_grad = True
    combines_grads = True
    needs_grad_scale = False

    def wants_perturbation(self, step: Step) -> bool:
        return step.groups[0]["looksam_step"] % self.k == 0 or step.state("sharpness_direction").empty

    def descent(self, step: Step) -> None:
        direction = step.state("sharpness_direction")
        if step.scheduled and not self.needs_second_pass:  # a plain step in place of a due second pass adds nothing
            p = step.grad.products(direction)
            ratio = torch.where(p.yy > 0, (p.xx / p.yy).sqrt(), 0.0)
            step.update_grad = step.grad + self.alpha * ratio * direction

    def updated(self, step: Step) -> None:
        if step.perturbed:
            g_s, g = step.grad, step.ascent_grad
            p = g_s.products(g)
            along = torch.where((p.yy > 0) & p.yy.isfinite(), p.xy / p.yy, 0.0)
            step.state("sharpness_direction").copy_(g_s - along * g)
        if step.scheduled:
            for group in step.groups:
                group["looksam_step"] += 1
