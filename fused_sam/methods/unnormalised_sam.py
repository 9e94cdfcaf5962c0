"""Unnormalised SAM (USAM): the perturbation is rho times the gradient.

    e = rho g;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from typing import Any

from fused_sam.sam import SAM
from fused_sam.step import Step


class UnnormalisedSAM(SAM):
    """SAM without the division by the gradient's norm: Andriushchenko and Flammarion, ICML 2022, arXiv 2206.06232.

    Use it to follow analyses of SAM, which mostly study this form, and where the perturbation is to vanish with the
    gradient.

    Args:
        rho: in units of weight per gradient, so that SAM's values mean nothing here: e is as long as SAM's with rho *
            ||g|| as SAM's rho.
        Others: as SAM. With adaptive=True, e = rho T^2 g. Under a GradScaler pass the scale with every step where
            first_step() is called by hand: first_step(grad_scale=scaler.get_scale()).

    Raises:
        As SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: norm 4, perturb 16, check 4, update 20 | 4 | 2 |
    """

    def radius(self, step: Step) -> Any:
        return step.rho * step.ascent_norm
