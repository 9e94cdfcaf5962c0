"""Reading all parameters' gradients at once: in C++ where fused_sam._cpu is there, else attribute by attribute."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Reading = tuple[list[Tensor], list[int], list[int]]


class Reader(Protocol):
    def read(self, groups: list[list[Tensor]], params: list[Tensor]) -> Reading | None:
        """(gradients, their addresses, the parameters' addresses), or None unless the common case holds.

        That is: the parameters of `groups` are those of `params` in order, and every one has a gradient of its own
        dtype and layout. A reader may recognise contiguous layouts alone.

        Raises:
            RuntimeError: a gradient has no memory of its own (it is sparse).
        """

    def mark(self, tensors: list[Tensor | None], name: str) -> None:
        """Set attribute `name` of every tensor that is not None to the tensor's version."""


class PythonReader:
    def read(self, groups: list[list[Tensor]], params: list[Tensor]) -> Reading | None:
        members = [p for group in groups for p in group]
        if len(members) != len(params) or not all(map(operator.is_, members, params)):
            return None
        gradients = [p.grad for p in params]
        for p, g in zip(params, gradients, strict=True):
            if g is None or g.dtype is not p.dtype or not g.is_contiguous():
                return None
        return gradients, [g.data_ptr() for g in gradients], [p.data_ptr() for p in params]  # type: ignore[return-value, union-attr]

    def mark(self, tensors: list[Tensor | None], name: str) -> None:
        for t in tensors:
            if t is not None:
                setattr(t, name, t._version)


@cache
def reader() -> Reader:
    """The fastest reader there is."""
    try:
        from fused_sam import _cpu  # type: ignore[attr-defined]
    except ImportError:
        return PythonReader()
    base: Any = torch._C.TensorBase
    compiled: Reader = _cpu.Reader(base, (torch.Tensor, torch.nn.Parameter))
    return compiled
