"""GCSAM: the perturbation follows the centralised gradient.

    c(g) = g - mean of g over dims 1.. , for tensors of more than one dimension;  e = rho c(g) / ||c(g)||
"""

from __future__ import annotations

import torch

from fused_sam.sam import SAM
from fused_sam.step import Step


class GCSAM(SAM):
    """Gradient Centralized SAM: Hassan, Vakanski, Zhang and Xian, arXiv 2501.11584.

    Use it for convolutional networks with noisy gradients. Published: above SAM on CIFAR-10 and on medical images.
    The centralisation is that of Yong et al., ECCV 2020, arXiv 2004.01461; only the ascent gradient is centralised.

    Options: SAM's. The norm is that of the centralised gradient, so that ||e|| = rho. The first gradients are changed
    in place; the second ones are used as they are.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 56: centralising 12, norm 4, perturb 16, check 4, update 20 | 4, and 2 per matrix or kernel | 2 |
    """

    needs_grad_scale = False

    def ascent(self, step: Step) -> None:
        for k, group in enumerate(step.groups):
            if group["perturb"]:
                for _, g in step.grad.group(k).items():
                    if g.dim() > 1 and g.numel():
                        wide = torch.promote_types(g.dtype, torch.float32)
                        total = g.sum(dim=tuple(range(1, g.dim())), keepdim=True, dtype=wide)
                        g.sub_(total / (g.numel() // g.shape[0]))  # gloo has no mean over processes
