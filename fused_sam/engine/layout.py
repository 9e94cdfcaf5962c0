"""How tensors lie in memory, and optimizer state in the layout of its parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    matches = isinstance(value, Tensor) and value.dtype is torch.float32 and value.device == p.device
    if matches and value.dim() == 0 and is_readable(value):
        return value
    return torch.as_tensor(value, dtype=torch.float32).reshape(()).to(p.device, copy=True)


def match_layout(value: Tensor, p: Tensor) -> Tensor:
    """Return state of the parameter's shape in its memory layout and in the arithmetic's dtype; itself if it matches.

    State of bf16 and fp16 parameters is fp32: summed in bf16, contributions below 2^-9 of the sum would be lost.
    """
    dtype = arithmetic_dtype(p.dtype)
    matches = value.dtype is dtype and value.device == p.device and same_layout(p, value)
    if matches and (is_readable(value) or is_wrapper(p)):
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


def place_of(p: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...], bool, int]:
    """Return what tables assume of a parameter: address, dtype, shape, strides, sign, and bytes of its storage."""
    return p.data_ptr(), p.dtype, p.shape, p.stride(), p.is_neg(), p.untyped_storage().nbytes()


def is_wrapper(t: Tensor) -> bool:
    """Return True if the tensor has elements and no memory of its own.

    Wrapper subclasses (of quantised weights, for instance), zero tensors and meta tensors have the address 0.
    """
    return t.data_ptr() == 0 and t.numel() > 0


def is_readable(t: Tensor) -> bool:
    """Return True if the tensor's memory holds its values. Kernels take no other tensor."""
    return not is_wrapper(t) and not t.is_neg()


def extent(t: Tensor) -> int:
    """Return how many bytes there are from the tensor's first element to the end of its last."""
    if not t.numel():
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def in_storage(t: Tensor, numel: int | None = None) -> bool:
    """Return False if the tensor reaches beyond its storage, which was freed or made smaller.

    A wrapper has no storage, and counts as inside.

    Args:
        numel: the number of elements of a tensor that fills one block of memory.
    """
    size = extent(t) if numel is None else numel * t.element_size()
    if not size or t.device.type == "meta":
        return True
    try:
        available = t.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return True
    if is_wrapper(t) and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    return t.storage_offset() * t.element_size() + size <= available


def sharing(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return for each tensor the number of an earlier one that it shares memory with, or its own; None if it does not.

    Its own number: several of its elements are at one address, as in an expanded tensor. Columns of one matrix have
    address ranges that overlap, and share nothing.
    """
    found: list[int | None] = [i if _overlaps_itself(t) else None for i, t in enumerate(tensors)]
    spans = []
    for i, t in enumerate(tensors):
        begin = t.data_ptr()
        if begin and t.numel():
            spans.append((t.device.index or 0, begin, begin + extent(t), i))
    spans.sort()
    cluster: list[tuple[int, int, int, int]] = []
    end = 0
    for span in [*spans, None]:
        if span is not None and cluster and span[0] == cluster[0][0] and span[1] < end:
            end = max(end, span[2])
            cluster.append(span)
            continue
        if len(cluster) > 1:
            _find_owners(tensors, cluster, end, found)
        if span is not None:
            cluster, end = [span], span[2]
    return found


def _find_owners(
    tensors: Sequence[Tensor], cluster: list[tuple[int, int, int, int]], end: int, found: list[int | None]
) -> None:
    """Write into `found` which tensors of a cluster of overlapping address ranges have an element in common."""
    base = cluster[0][1]
    unit = math.gcd(*(begin - base for _, begin, _, _ in cluster), *(tensors[i].element_size() for *_, i in cluster))
    owners = torch.full(((end - base) // unit,), -1, dtype=torch.int32)
    for i, begin in sorted((i, begin) for _, begin, _, i in cluster):
        t = tensors[i]
        words = t.element_size() // unit
        strides = [s * words for s in t.stride()]
        part = owners.as_strided((*t.shape, words), (*strides, 1), (begin - base) // unit)
        other = int(part.max())
        if other >= 0:
            found[i] = other
        elif found[i] is None:
            part.fill_(i)


def _overlaps_itself(t: Tensor) -> bool:
    """Return True if several elements are at one address, or if the strides do not rule it out."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


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
