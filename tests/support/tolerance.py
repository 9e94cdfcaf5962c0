"""How far a result may lie from the same numbers in float64, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A written weight is the sum of at most four products, each operation within half an ulp of the arithmetic's type:
# 8 ulp of the largest term in a tensor holds for one step, whether multiply-adds are fused or not.
OPERATIONS = 8


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def bound(expected: Tensor, dtype: torch.dtype, steps: int) -> float:
    """Rounding of `steps` steps: of the arithmetic, and half an ulp of the storage type for each write."""
    largest = max(float(expected.abs().max()), 1.0) * 4  # terms that cancel are a few times larger than their sum
    storage = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0
    return steps * largest * (OPERATIONS * torch.finfo(arithmetic(dtype)).eps + storage / 2)


def assert_close(found: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype, steps: int = 1) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        error = float((a.detach().double() - b.detach().double()).abs().max())
        assert error <= bound(b.detach(), dtype, steps), f"tensor {i} of shape {tuple(a.shape)} is off by {error:.3g}"
