"""The bounds on a result's distance from the float64 result, with their reasons."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A written weight is the sum of at most four products, and each operation errs by half an ulp at most. 8 ulp of the
# largest term in a tensor bound one step, with or without fused multiply-adds.
OPERATIONS = 8


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def bound(expected: Tensor, dtype: torch.dtype, steps: int) -> float:
    """Return the rounding error of `steps` steps: that of the arithmetic, and half an ulp of the storage per write."""
    largest = max(float(expected.abs().max()), 1.0) * 4  # terms that cancel may be a few times larger than their sum
    storage = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0
    return steps * largest * (OPERATIONS * torch.finfo(arithmetic(dtype)).eps + storage / 2)


def assert_close(found: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype, steps: int = 1) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        error = float((a.detach().double() - b.detach().double()).abs().max())
        assert error <= bound(b.detach(), dtype, steps), f"tensor {i} of shape {tuple(a.shape)} is off by {error:.3g}"
