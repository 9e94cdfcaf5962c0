"""ASAM: a perturbation in proportion to each weight, so that rescaling a layer does not change its sharpness.

    e = rho T^2 g / ||T g||,  T = |w| + eta for weights, 1 for biases and norm layers;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from torch import Tensor

from fused_sam.sam import SAM
from fused_sam.step import option


class ASAM(SAM):
    """Adaptive SAM: Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600, with p = 2.

    Use it if layers differ much in scale, or if one rho is to serve several networks.

    Args:
        rho: 0.5 (CIFAR-10) and 1.0 (CIFAR-100) in the paper; 0.5 is the default of the authors' class.
        eta: T's offset, in the weights' unit; 0.01 in the paper and in the authors' class.
        scale: "weights": tensors of fewer than two dimensions (biases, norm layers' scales) have T = 1. ASAM's authors
            leave biases (and norm layers' shifts) unscaled; this class leaves every one-dimensional tensor unscaled.
            "all": every tensor is scaled; with eta=0 that is the public SAM package's adaptive=True.
        Others: as SAM. SAM(adaptive=True) has other defaults: those of the public SAM package, eta 0, every tensor
            scaled, and SAM's rho, where that package recommends 2. A group's `adaptive=False` switches the scaling off
            for that group.

    Raises:
        ValueError: scale is neither "weights" nor "all"; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 48: norm 8, since it reads the weights too, perturb 16, check 4, update 20 | 4 | 2 |
    """

    OPTIONS = {"scale": option("weights", choices=("weights", "all"), fixed=True, help="which tensors T scales")}
    scale: str
    DEFAULTS = {"rho": 0.5, "adaptive": True, "eta": 0.01}

    def is_scaled(self, param: Tensor) -> bool:
        return self.scale == "all" or param.dim() > 1
