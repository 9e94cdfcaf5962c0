"""How tensors lie in memory, and optimizer state in the layout of its parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import StateColumn, arithmetic_dtype


def init_state(column: StateColumn, p: Tensor) -> Tensor:
    """Return new state for the parameter `p`: the column's starting value throughout."""
    if column.scalar:
        return torch.full((), column.init, dtype=torch.float32, device=p.device)
    return torch.full_like(p, column.init, dtype=arithmetic_dtype(p.dtype), requires_grad=False)


def match_scalar(value: Any, p: Tensor) -> Tensor:
    """Return a scalar of the state as an fp32 tensor on the device of `p`; itself if it is one already.

    torch keeps Adam's step on the CPU, and old versions kept it as an int.
    """
    if isinstance(value, Tensor) and value.dtype is torch.float32 and value.device == p.device and value.dim() == 0:
        return value
    return torch.as_tensor(value, dtype=torch.float32).reshape(()).to(p.device, copy=True)


def match_layout(value: Tensor, p: Tensor) -> Tensor:
    """Return state of the parameter's shape in its memory layout and in the arithmetic's dtype; itself if it matches.

    State of bf16 and fp16 parameters is fp32: summed in bf16, contributions below 2^-9 of the sum would be lost.
    """
    dtype = arithmetic_dtype(p.dtype)
    if value.dtype is dtype and value.device == p.device and same_layout(p, value):
        return value
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)


def is_dense(t: Tensor) -> bool:
    """Return True if the tensor's elements fill one block of memory, each place once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return t.layout is torch.strided


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors of one shape have their elements in one order in memory."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(n <= 1 or s == t for n, s, t in strides)


def owned(g: Tensor) -> Tensor:
    """Return the gradient, or a copy of it if it is part of a larger storage.

    DistributedDataParallel's next backward pass writes its buckets again.
    """
    part = getattr(g, "_local_tensor", g)
    whole = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return g if whole else g.clone(memory_format=torch.preserve_format)
