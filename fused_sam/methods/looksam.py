"""LookSAM: SAM's second pass on every k-th step; between, the part of its gradient that changes slowly is used again.

    t % k == 0:  g, g_s as SAM;  g_v = g_s - (<g, g_s> / ||g||^2) g, kept;  w = BASE(w, g_s)
    else:        g alone;        w = BASE(w, g + alpha (||g|| / ||g_v||) g_v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import XX, XY, YY, Group
from fused_sam.engine.calls import Scan
from fused_sam.engine.options import check_count, check_range
from fused_sam.engine.plan import Plan
from fused_sam.engine.vectors import Pair

from .extra_state import Remembering


class LookSAM(Remembering):
    """Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714.

    Args:
        k: two passes on every k-th step, the first one included; 5 in the paper.
        alpha: 0 to 1, how much of the kept direction is added; 0.7 for ViT; smaller values, 0.1 to 0.3, are used on
            CIFAR.
        Others: as SAM. Steps that a schedule leaves out are the base optimizer's own and are not counted; a step that
            was skipped is.

    g_v is "sharpness_direction" in the state. A step without one, such as the first after loading another optimizer's
    checkpoint, is a SAM step. The direction has no scale, so a GradScaler needs no care. Norms are global, over the
    weights that have both a gradient and a direction. first_step() takes the gradients from the parameters.

    Use it in long runs, where SAM's price counts. Published: SAM's gain in accuracy at a cost near the base
    optimizer's, for ViTs on ImageNet.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every k-th step | 64: P1 4, P2 16, P1 4, P3 20, P4 8, P5 12 | 6 | 2 |
    | between | 44: P4 8, P5 12, P1 4, P3 20 | 4 | 1 |

    Under a GradScaler too what is combined is judged, by the same P1; the scaler does not learn of a step so skipped.

    Memory beside SAM's: 4 bytes for g_v; 4 more for g during the second pass.

    Raises:
        TypeError, ValueError: k or alpha out of range, k when a step begins too; as SAM.
    """

    _copied = (*Remembering._copied, "k", "alpha")
    _memory = "sharpness_direction"
    _keeps_gradients = True
    _recombines = True
    _active = False  # whether this step is LookSAM's, with one pass or two, and not the base optimizer's

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        k: int = 5,
        alpha: float = 0.7,
        **options: Any,
    ) -> None:
        self.k = check_count("k", k)
        self.alpha = check_range("alpha", alpha, 0, 1)
        super().__init__(params, base_optimizer, rho, adaptive, **options)

    def _own_defaults(self) -> dict[str, Any]:
        return {**super()._own_defaults(), "looks": 0}

    def _due(self) -> bool:
        k = check_count("k", self.k)  # it may be changed between steps
        self._active = super()._due()
        return self._active and (self.param_groups[0]["looks"] % k == 0 or not self._remembers())

    def _descent(self, plan: Plan, scan: Scan, groups: list[Group], *, perturbed: bool) -> None:
        if self._kept is not None or self.perturbs or not self._active:
            return
        pair = Pair(plan, scan.gradients, self._recalled(plan, scan.gradients))
        sums = pair.dots()
        ratio = torch.where(sums[YY] > 0, (sums[XX] / sums[YY]).sqrt(), torch.zeros_like(sums[YY]))
        pair.combine(scan.gradients, 1.0, self.alpha * ratio)

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        if self._kept is not None and not self._known_skip():
            pair = Pair(plan, scan.gradients, self._kept)
            sums = pair.dots()
            along = torch.where(sums[YY] > 0, sums[XY] / sums[YY], torch.zeros_like(sums[YY]))
            both = [None if g is None else h for g, h in zip(scan.gradients, self._kept, strict=True)]
            old, new = self._recalled(plan, both), self._to_begin(plan, both)
            direction = [n if v is None else v for v, n in zip(old, new, strict=True)]
            pair.combine(direction, 1.0, -along, self._status())
        if self._active:
            for group in self.param_groups:
                group["looks"] += 1
        self._active = False
