"""F-SAM, "Friendly": climb along what is this batch's own in its gradient, the average of all batches subtracted.

    first step: d = g, m = g;  after: d = g - sigma m, m = lmbda m + (1 - lmbda) g
    e = rho d / ||d||;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import Group
from fused_sam.engine.calls import Scan
from fused_sam.engine.options import check_range
from fused_sam.engine.plan import Plan
from fused_sam.engine.vectors import Pair

from .extra_state import Remembering


class FriendlySAM(Remembering):
    """Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350.

    The average m is subtracted before this batch enters it, as in the authors' program; the paper's text enters it
    first, which for sigma = 1 is the same direction.

    Args:
        sigma: 0 to 100, how much of the average is subtracted; 1 in the paper.
        lmbda: 0 to 1, the average's memory; 0.9 in the authors' program.
        Others: as SAM.

    m is "gradient_average" in the state, of gradients without a loss scale; a skipped step does not enter it, and a
    weight's begins with its first update. With a schedule it averages over the steps that perturb. Under a GradScaler
    pass the scale with every step: first_step(grad_scale=scaler.get_scale()). first_step() takes the gradients from the
    parameters.

    Use it where batches are small or differ much. Published: above SAM on CIFAR and ImageNet with several networks, and
    more robust to label noise.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 68: P5 12, P1 4, P2 16, P1 4, P3 20, P5 12 | 6 | 2 |

    Memory beside SAM's: 4 bytes for m; 4 more for d during the second pass.

    Raises:
        TypeError, ValueError: sigma or lmbda out of range; as SAM.
        RuntimeError: an update under a GradScaler whose scale was not told; nothing is changed.
    """

    _copied = (*Remembering._copied, "sigma", "lmbda")
    _memory = "gradient_average"
    _keeps_gradients = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.6,
        **options: Any,
    ) -> None:
        self.sigma = check_range("sigma", sigma, 0, 100)
        self.lmbda = check_range("lmbda", lmbda, 0, 1)
        super().__init__(params, base_optimizer, rho, adaptive, **options)

    @property
    def needs_scale(self) -> bool:
        return True

    def first_step(self, zero_grad: bool = False, *, grad_scale: Tensor | float | None = None) -> None:
        """As SAM's; grad_scale: what the loss was multiplied by, a GradScaler's scale (sets `loss_scale`)."""
        if grad_scale is not None:
            self.loss_scale = grad_scale
        super().first_step(zero_grad)

    def _ascent(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        scale = 1.0 if self.loss_scale is None else self.loss_scale  # d keeps it: fp16 gradients would be lost without
        Pair(plan, scan.gradients, self._recalled(plan, scan.gradients)).combine(
            scan.gradients, 1.0, -self.sigma * scale
        )

    def _descent(self, plan: Plan, scan: Scan, groups: list[Group], *, perturbed: bool) -> None:
        if self._kept is not None and getattr(self, "grad_scale", None) is not None and self.loss_scale is None:
            raise RuntimeError(
                "FriendlySAM averages gradients over steps and must know the loss scale: call "
                "first_step(grad_scale=scaler.get_scale()), or set optimizer.loss_scale, before each step"
            )

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        if self._kept is None or self._known_skip():
            return
        unscale = 1.0 if self.loss_scale is None else 1.0 / self.loss_scale
        old, status = self._recalled(plan, self._kept), self._status()
        # A base optimizer takes a weight's state for begun where it has any: m begins where the update has begun it.
        both = [None if g is None else d for g, d in zip(scan.gradients, self._kept, strict=True)]
        new = self._to_begin(plan, both)
        # g = d + sigma m: m needs no copy of g.
        keep = self.lmbda + (1 - self.lmbda) * self.sigma
        Pair(plan, old, self._kept).combine(old, keep, (1 - self.lmbda) * unscale, status)
        Pair(plan, new, self._kept).combine(new, 0.0, unscale, status)
