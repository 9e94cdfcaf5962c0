"""How tensors lie in memory, and optimizer state that lies as its weight does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import arithmetic_dtype


def begun(name: str, p: Tensor) -> Tensor:
    """State that has never been written: torch's zeros, and for SGD's momentum -0.0, see Backend.sgd."""
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=p.device)
    value = -0.0 if name == "momentum_buffer" else 0.0
    return torch.full_like(p, value, dtype=arithmetic_dtype(p.dtype), requires_grad=False)


def fitting_step(step: Any, p: Tensor) -> Tensor:
    """Adam's step as an fp32 number beside the weight; torch has it on the CPU, and old versions had it as an int."""
    if isinstance(step, Tensor) and step.dtype is torch.float32 and step.device == p.device and step.dim() == 0:
        return step
    return torch.as_tensor(step, dtype=torch.float32).reshape(()).to(p.device, copy=True)


def fitting(buffer: Tensor, p: Tensor) -> Tensor:
    """State of a weight's shape in the arithmetic's dtype and the weight's layout, the buffer itself where it has them.

    bf16 and fp16 weights have it in fp32: added up in bf16, contributions below 2^-9 of the sum would be lost.
    """
    dtype = arithmetic_dtype(p.dtype)
    if buffer.dtype is dtype and buffer.device == p.device and is_alike(p, buffer):
        return buffer
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(buffer)


def is_flat(t: Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each place once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return t.layout is torch.strided


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(n <= 1 or s == t for n, s, t in strides)
