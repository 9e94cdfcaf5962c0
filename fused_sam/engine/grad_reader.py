"""Reading all parameters' gradients at once: in C++ where fused_sam._cpu is there, else attribute by attribute."""

from __future__ import annotations

import operator
from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

Reading = tuple[list[Tensor], bytes]
State = dict[Tensor, dict[str, Any]]
Entries = list[dict[str, Any]]


class Reader(Protocol):
    """What an update asks of a fixed list of parameters and of the optimizer's state."""

    def read(self, groups: list[list[Tensor]]) -> Reading | None:
        """(gradients, their addresses as packed int64), or None unless the common case holds.

        That is: the parameters of `groups` are those given, in order and where they were, and every one has a gradient
        of its own dtype and layout. A reader may recognise contiguous layouts alone.

        Raises:
            RuntimeError: a gradient has no memory of its own (it is sparse).
        """

    def unchanged(
        self,
        state: State,
        all_entries: Entries,
        entries: Entries,
        keys: tuple[str, ...],
        values: list[list[Tensor | None]],
        /,
    ) -> bool:
        """Whether the state has just `all_entries`, in order, and entries[i][keys[k]] is values[k][i].

        None among the values: that entry has no such key.
        """


class PythonReader:
    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self._places = [(p.data_ptr(), p.dtype, p.shape) for p in params]

    def read(self, groups: list[list[Tensor]]) -> Reading | None:
        params = [p for group in groups for p in group]
        if len(params) != len(self._params) or not all(map(operator.is_, params, self._params)):
            return None
        gradients = []
        for p, place in zip(params, self._places, strict=True):
            g = p.grad
            if g is None or g.dtype is not p.dtype or (p.data_ptr(), p.dtype, p.shape) != place:
                return None
            if not (g.is_contiguous() and p.is_contiguous()):
                return None
            gradients.append(g)
        return gradients, array("q", [g.data_ptr() for g in gradients]).tobytes()

    def unchanged(
        self,
        state: State,
        all_entries: Entries,
        entries: Entries,
        keys: tuple[str, ...],
        values: list[list[Tensor | None]],
        /,
    ) -> bool:
        return (
            len(all_entries) == len(state)
            and all(map(operator.is_, all_entries, state.values()))
            and all(
                all(map(operator.is_, [entry.get(key) for entry in entries], column))
                for key, column in zip(keys, values, strict=True)
            )
        )


def make_reader(params: list[Tensor]) -> Reader:
    """The fastest reader of these parameters that can be had."""
    try:
        from fused_sam import _cpu  # type: ignore[attr-defined]
    except ImportError:
        return PythonReader(params)
    compiled: Reader = _cpu.Reader(torch._C.TensorBase, (torch.Tensor, torch.nn.Parameter), params)
    return compiled
