"""Unnormalised SAM (Andriushchenko and Flammarion, arXiv 2206.06232): the perturbation is rho times the gradient.

    e = rho g;  w = BASE(w, grad L(w + e))
"""

from typing import Any

from fused_sam import SAM, Step


class UnnormalisedSAM(SAM):
    """SAM without the division by the gradient's norm. Options: SAM's."""

    def radius(self, step: Step) -> Any:
        return step.rho * step.ascent_norm
