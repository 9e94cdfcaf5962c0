"""This module measures how many bf16 and fp16 weights rounding would keep unperturbed, and warns before training.

A weight moves only if its part of e = rho * g / ||g|| exceeds half the gap to its neighbours. If all N elements of the
gradient are equally large, that part is rho / sqrt(N).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_sam.backends.contract import LOW_PRECISION

from .sharding import local


class RoundingWarning(UserWarning):
    """Warns that rounding keeps weights from being perturbed."""


_MAX_SAMPLES = 4096  # weights checked per tensor; the fraction that moves is then accurate to within 2%
_TOLERATED = 0.1  # fraction of the weights that may stay unperturbed without a warning


def warn_of_rounding(groups: Sequence[dict[str, Any]]) -> None:
    """Warn if rounding to nearest would keep more than a tenth of bf16 or fp16 weights from moving."""
    members = ((p, group) for group in groups for p in group["params"] if not is_lazy(p))
    perturbed = [(p, float(group["rho"])) for p, group in members if group["perturb"]]
    count = sum(p.numel() for p, _ in perturbed)
    still = low = 0.0
    dtype, largest = None, 0.0
    for p, rho in perturbed:
        if p.dtype in LOW_PRECISION and p.numel() and p.device.type != "meta" and rho > 0:
            still += p.numel() * unmoved_fraction(local(p.detach()), rho / math.sqrt(count))
            low += p.numel()
            dtype, largest = p.dtype, max(largest, rho)
    if low and still > _TOLERATED * low:
        warnings.warn(
            f"{str(dtype).removeprefix('torch.')} weights are too coarse for this perturbation: rho {largest:g} over "
            f"{count:,} weights is {largest / math.sqrt(count):.1e} per weight, which about {still / low:.0%} of them "
            "round away. Pass master_weights=True (fp32 masters) or stochastic_rounding=True, keep the weights in fp32 "
            "and use torch.autocast, or raise rho (docs/precision.md has the measurements)",
            RoundingWarning,
            stacklevel=4,
        )


def unmoved_fraction(w: Tensor, step: float) -> float:
    """Return the fraction of w's elements that do not change when step is added.

    It is estimated from 1 to 4096 elements, evenly spaced; 0.0 without elements.
    """
    flat = w.reshape(-1)
    if flat.numel() == 0:
        return 0.0
    sample = flat[:: flat.numel() // _MAX_SAMPLES + 1]
    moved = (sample.float() + step).to(w.dtype) != sample
    return 1.0 - float(moved.to(torch.float32).mean())
