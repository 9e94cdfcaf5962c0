"""What rounding does to a perturbation of bf16 and fp16 weights, in numbers, before a run is spent on it.

A weight moves only if its part of e = rho * g / ||g|| exceeds half the gap to its neighbours. Where the gradient's size
is spread evenly, that part is rho / sqrt(N) for N weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION

from .sharding import local


class RoundingWarning(UserWarning):
    """Rounding keeps weights from being perturbed."""


_SAMPLED = 4096  # weights of each tensor: their share that moves is then known to within 2%
_TOLERATED = 0.1  # of the weights may stay where they are without a warning


def warn_of_rounding(groups: Sequence[dict[str, Any]]) -> None:
    """Warn where rounding to nearest would keep more than a tenth of bf16 or fp16 weights from moving."""
    perturbed = [(p, float(group["rho"])) for group in groups for p in group["params"] if group["perturb"]]
    count = sum(p.numel() for p, _ in perturbed)
    still = low = 0.0
    dtype, largest = None, 0.0
    for p, rho in perturbed:
        if p.dtype in LOW_PRECISION and p.numel() and p.device.type != "meta" and rho > 0:
            still += p.numel() * share_too_coarse(local(p.detach()), rho / math.sqrt(count))
            low += p.numel()
            dtype, largest = p.dtype, max(largest, rho)
    if low and still > _TOLERATED * low:
        warnings.warn(
            f"{str(dtype).removeprefix('torch.')} weights are too coarse for this perturbation: rho {largest:g} over "
            f"{count:,} weights is {largest / math.sqrt(count):.1e} a weight, which about {still / low:.0%} of them "
            "round away; pass master_weights=True (fp32 masters) or stochastic_rounding=True, keep the weights in fp32 "
            "and use torch.autocast, or raise rho (docs/precision.md has the measurements)",
            RoundingWarning,
            stacklevel=4,
        )


def share_too_coarse(w: Tensor, step: float) -> float:
    """The share of w's elements (1 to 4096 of them, evenly spaced) that do not change when +-step is added."""
    flat = w.reshape(-1)
    if flat.numel() == 0:
        return 0.0
    sample = flat[:: flat.numel() // _SAMPLED + 1]
    moved = (sample.float() + step).to(w.dtype) != sample
    return 1.0 - float(moved.to(torch.float32).mean())
