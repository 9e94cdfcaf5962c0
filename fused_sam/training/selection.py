"""ESAM's sharpness-sensitive data selection keeps the samples with the largest rise in loss.

    d_i = L_i(w + e) - L_i(w);  keep the max(1, round(gamma B)) samples with the largest d_i

Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
arXiv 2110.03141. The authors' program keeps the samples above a threshold; with ties, these can be none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sam.methods import ESAM


def select_sharp(before: Tensor, after: Tensor, gamma: float) -> Tensor:
    """Return the indices of the samples with the largest `after - before`, in ascending order.

    Use it for ESAM's second pass in a hand-written loop. The result is int64 of shape [max(1, round(gamma B))].

    Args:
        before: losses at the weights, [B].
        after: losses at the perturbed weights, [B], on the same device.
        gamma: fraction of the samples to keep, above 0, at most 1.

    Raises:
        ValueError: gamma is out of range, there are no samples, or a shape is not [B].
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be above 0 and at most 1, not {gamma!r}")
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise ValueError(
            "select_sharp() needs one loss per sample before and after the perturbation, both of shape [B]; "
            f"got {list(before.shape)} and {list(after.shape)}"
        )
    ESAM.selections += 1
    keep = max(1, round(gamma * len(before)))
    rise = (after.detach() - before.detach()).float()
    return torch.topk(rise, keep).indices.sort().values
