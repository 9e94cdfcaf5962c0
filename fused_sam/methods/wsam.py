"""WSAM: sharpness as a term of the loss with a weight of its own.

    L(w) + a (max L(w + e) - L(w)),  a = gamma / (1 - gamma)
    coupled: w = BASE(w, (1 - a) g + a g_s);   decoupled: w = BASE(w, g) - lr a (g_s - g)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import SKIP, UPDATE_NORM, XX, Group
from fused_sam.engine.calls import Scan
from fused_sam.engine.options import check_range
from fused_sam.engine.plan import Plan
from fused_sam.engine.sharding import like
from fused_sam.engine.vectors import Pair
from fused_sam.sam import SAM


class WSAM(SAM):
    """Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD 2023,
    arXiv 2305.15817, with both forms of the step as in the authors' program.

    Args:
        gamma: from 0 (the base optimizer) over 0.5 (SAM, if coupled) to below 1; 0.9 in the authors' README.
        decouple: the sharpness term g_s - g moves the weights beside the base step and enters no momentum (the paper's
            choice); False: it is part of the gradient that the base optimizer gets.
        Others: as SAM. max_norm clips g and the sharpness term by one factor, that of g's norm, if decoupled; the
            authors' program clips g and g_s each by its own norm.

    first_step() takes the gradients from the parameters; after a decoupled step p.grad holds g. `update_norm` is of
    what the base optimizer got.

    Use it to tune how much flatness counts, with one more number. Published: above the base optimizer, and above or
    level with SAM and its variants on CIFAR, ImageNet and label noise.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | coupled | 56: P1 4, P2 16, P5 12, P1 4, P3 20 | 5 | 2 |
    | decoupled | 76: P1 4, P2 16, P5 12, P4 8, P1 4, P3 20, P5 12 | 6, and one a group | 2 |

    Under a GradScaler too what is combined is judged, by the same P1; the scaler does not learn of a step so skipped.

    Memory beside SAM's: 4 bytes for g during the second pass.

    Raises:
        TypeError, ValueError: gamma out of range; as SAM. stochastic_rounding with decouple=True, which moves the
            weights a second time, by steps that rounding to nearest would lose.
    """

    _copied = (*SAM._copied, "gamma", "decouple")
    _keeps_gradients = True
    _recombines = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        gamma: float = 0.9,
        decouple: bool = True,
        **options: Any,
    ) -> None:
        self.gamma = check_range("gamma", gamma, 0, 1)
        if self.gamma == 1:
            raise ValueError("gamma must be below 1: the sharpness term weighs gamma / (1 - gamma)")
        self.decouple = bool(decouple)
        if self.decouple and options.get("stochastic_rounding"):
            raise ValueError("stochastic_rounding needs decouple=False; with decouple=True use master_weights=True")
        super().__init__(params, base_optimizer, rho, adaptive, **options)

    def _descent(self, plan: Plan, scan: Scan, groups: list[Group], *, perturbed: bool) -> None:
        if self._kept is None:
            return
        weight = self.gamma / (1 - self.gamma)
        pair = Pair(plan, scan.gradients, self._kept)
        if not self.decouple:
            pair.combine(scan.gradients, weight, 1 - weight)
            return
        pair.combine(scan.gradients, 1.0, -1.0)
        if self._check_update:  # the judge sees g alone
            self._status()[SKIP] += ~pair.dots()[XX].isfinite()
        self._exchange(plan, scan)

    def _exchange(self, plan: Plan, scan: Scan) -> None:
        """The first gradients to the base optimizer, and the sharpness term, which lies in the second ones, kept."""
        assert self._kept is not None
        scan.addresses = None
        for i, (h, g) in enumerate(zip(scan.gradients, self._kept, strict=True)):
            if h is None or g is None:
                self._kept[i] = None
                continue
            if g.dtype is not h.dtype or g.stride() != h.stride():
                g = torch.empty_like(h).copy_(g)
            scan.gradients[i], self._kept[i] = g, h
            plan.owners[i].grad = like(g, plan.owners[i])

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        if self._kept is None or not self.decouple:
            return
        weights, factor = plan.masters.written(), -self.gamma / (1 - self.gamma) * self._unscaled()
        for k, group in enumerate(groups):
            ours = [w if j == k else None for w, j in zip(weights, plan.group_of, strict=True)]
            sign = -1.0 if group.maximize else 1.0
            lr = self.param_groups[k]["lr"]
            Pair(plan, ours, self._kept).combine(ours, 1.0, sign * lr * factor, self._status())
        plan.masters.publish()
        self._wrote()

    def _unscaled(self) -> float | Tensor:
        """What the base optimizer's gradient was multiplied by: the loss scale undone, and the clipping."""
        unscale: float | Tensor = 1.0 if self._scale is None else 1.0 / self._scale.to(self._status())
        if self._max_norm == math.inf:
            return unscale
        clip = self._max_norm / (self._status()[UPDATE_NORM] * unscale + 1e-6)
        return unscale * clip.clamp(max=1.0)
