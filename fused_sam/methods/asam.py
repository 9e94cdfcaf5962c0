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
        scale: "matrices": tensors of fewer than two dimensions (biases, norm layers' scales) have T = 1. "all": every
            tensor is scaled; with eta=0 that is the public SAM package's adaptive=True. Or names: tensors of these
            names, whole or last parts, are scaled, and the optimizer needs model.named_parameters(). ("weight",) is
            what ASAM's authors scale, which is norm layers' scales too. "weights" is an older name of "matrices".
        Others: as SAM. SAM(adaptive=True) has other defaults: those of the public SAM package, eta 0, every tensor
            scaled, and SAM's rho, where that package recommends 2. A group's `adaptive=False` switches the scaling off
            for that group.

    Raises:
        ValueError: scale is none of these, or names parameters and the optimizer has no names; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 48: norm 8, since it reads the weights too, perturb 16, check 4, update 20 | 4 | 2 |
    """

    OPTIONS = {
        "scale": option(
            "matrices", choices=("matrices", "all", "weights"), names=True, fixed=True, help="which tensors T scales"
        )
    }
    scale: str | tuple[str, ...]
    DEFAULTS = {"rho": 0.5, "adaptive": True, "eta": 0.01}

    def is_scaled(self, param: Tensor) -> bool:
        if isinstance(self.scale, tuple):
            name = self.name_of(param)
            return name in self.scale or name.rpartition(".")[2] in self.scale
        return self.scale == "all" or param.dim() > 1

    def name_of(self, param: Tensor) -> str:
        """Return the name that the optimizer was given with a parameter."""
        for group in self.param_groups:
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
                if p is param:
                    return str(name)
        raise ValueError(
            f"scale={self.scale!r} chooses tensors by name, and the optimizer has no names: "
            'pass model.named_parameters(), or set scale to "matrices" or "all"'
        )
