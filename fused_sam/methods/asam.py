"""ASAM: a perturbation in proportion to each weight, so that rescaling a layer does not change its sharpness.

    e = rho T^2 g / ||T g||,  T = |w| + eta for weights, 1 for biases and norm layers;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import Group
from fused_sam.engine.plan import Plan
from fused_sam.sam import SAM


class ASAM(SAM):
    """Adaptive SAM: Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600, with p = 2.

    Args:
        rho: 0.5 (CIFAR-10) and 1.0 (CIFAR-100) in the paper; 0.5 to 2 is usual.
        eta: T's offset, in the weights' unit; 0.01 in the paper.
        scale: "weights": tensors of fewer than two dimensions (biases, norm layers' scales) have T = 1. ASAM's authors
            leave biases (and norm layers' shifts) unscaled; this class leaves every one-dimensional tensor unscaled.
            "all": every tensor is scaled; with eta=0 that is the public SAM package's adaptive=True.
        Others: as SAM. A group's `adaptive=False` switches the scaling off for that group.

    Use it where layers differ much in scale, or where one rho is to serve several networks.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 48: P1 8, since the norm reads the weights too, P2 16, P1 4, P3 20 | 4 | 2 |

    Raises:
        ValueError: scale is neither "weights" nor "all"; as SAM.
    """

    _copied = (*SAM._copied, "scale")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.5,
        eta: float = 0.01,
        *,
        scale: str = "weights",
        **options: Any,
    ) -> None:
        if scale not in ("weights", "all"):
            raise ValueError(f'scale must be "weights" (biases and norm layers are left out) or "all", not {scale!r}')
        self.scale = scale
        super().__init__(params, base_optimizer, rho, options.pop("adaptive", True), eta=eta, **options)

    # Every group has a twin without scaling, n places further on, which the plan gives to tensors below two dimensions.

    def _groups(self) -> list[Group]:
        groups = super()._groups()
        return groups if self.scale == "all" else groups + [g._replace(adaptive=False) for g in groups]

    def _takes_part(self) -> list[bool]:
        return super()._takes_part() * (1 if self.scale == "all" else 2)

    def _new_plan(self) -> Plan:
        plan = super()._new_plan()
        if self.scale == "weights":
            n = len(self.param_groups)
            plan.group_of = [k if p.dim() > 1 else k + n for k, p in zip(plan.group_of, plan.params, strict=True)]
        return plan
