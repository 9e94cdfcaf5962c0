"""LayerSAM: each tensor is perturbed in proportion to its norm, along its gradient. Look-LayerSAM: with LookSAM.

    e_l = rho ||w_l|| g_l / ||g_l|| for every tensor l;  g_s = grad L(w + e);  w = BASE(w, g_s)
"""

from __future__ import annotations

from typing import Any

from fused_sam.sam import SAM
from fused_sam.step import Step

from .looksam import LookSAM


class LayerSAM(SAM):
    """Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714.

    The layer-wise perturbation of its large-batch half. Use it for large batches, where the norms of the layers'
    gradients differ much. Published, with LookSAM: ViT-B/16 on ImageNet with a batch of 32,768.

    Args:
        rho: the length of each tensor's e, over the norm of the tensor: 0.05 moves each by 5% of its norm.
        norm: "tensor"; "group": e_k = rho ||w_k|| g_k / ||g_k|| for each parameter group; "global": e = rho ||w||
            g / ||g||. Norms are over the perturbed tensors that have a gradient.
        Others: as SAM. `adaptive` scales g as in ASAM; ||w|| is the norm of the weights all the same.

    A tensor of zeros, such as a new bias, is not perturbed. Biases and norm layers count as tensors of their own.

    Raises:
        ValueError: norm is none of the three; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 48: norms 8, perturb 16, check 4, update 20 | 5, and about 20 over one number per tensor | 2 |
    """

    DEFAULTS = {"norm": "tensor"}
    reads_weight_norms = True
    needs_grad_scale = False  # the length of a gradient does not count

    def radius(self, step: Step) -> Any:
        return step.rho * step.weight_norms


class LookLayerSAM(LayerSAM, LookSAM):
    """Look-LayerSAM of the same paper: LayerSAM's perturbation in every k-th step, and LookSAM's reuse in between.

    Use it for large batches where LayerSAM's price counts. Published: ViT-B/16 on ImageNet in 0.7 hours with a batch
    of 32,768.

    Args:
        rho, norm: as LayerSAM.
        k, alpha: as LookSAM. The decomposition and the reuse take global norms, as in LookSAM.
        Others: as SAM.

    State, counters and errors are LookSAM's.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every k-th step | 68: norms 8, perturb 16, check 4, update 20, dot 8, axpby 12 | 7, and the small ones | 2 |
    | between | 44: dot 8, axpby 12, check 4, update 20 | 4 | 1 |
    """
