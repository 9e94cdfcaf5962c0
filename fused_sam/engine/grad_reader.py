"""A reader reads all parameters' gradients at once: in C++ if fused_sam._cpu is built, else one by one in Python."""

from __future__ import annotations

import operator
from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import in_storage, is_readable, place_of, sharing

# Gradients, their addresses as packed int64, and True if some are None, whose addresses are 0.
Reading = tuple[list[Tensor | None], bytes, bool]
State = dict[Tensor, dict[str, Any]]
Entries = list[dict[str, Any]]


class Reader(Protocol):
    """Reads what an update needs from a fixed list of parameters and from the optimizer's state."""

    def read(self, groups: list[list[Tensor]]) -> Reading | None:
        """Return the gradients and their addresses, or None except in the common case.

        In that case `groups` hold the reader's parameters, in order and at the same addresses. Every gradient that is
        there has its parameter's dtype and layout, in memory that no other gradient and no parameter shares. A reader
        may recognise contiguous layouts only.

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
        """Return True if the state has just `all_entries`, in order, and entries[i][keys[k]] is values[k][i].

        A value of None means that the entry must not have the key.
        """


class PythonReader:
    """Reads gradients attribute by attribute."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self._places = list(map(place_of, params))
        self._separate: list[int] = []  # addresses of gradients that share no memory

    def read(self, groups: list[list[Tensor]]) -> Reading | None:
        params = [p for group in groups for p in group]
        if len(params) != len(self._params) or not all(map(operator.is_, params, self._params)):
            return None
        grads: list[Tensor | None] = []
        for p, place in zip(params, self._places, strict=True):
            g = p.grad
            if place_of(p) != place:
                return None
            if g is not None and (g.dtype is not p.dtype or g.shape != p.shape):
                return None
            if g is not None and not (g.is_contiguous() and p.is_contiguous() and is_readable(g) and in_storage(g)):
                return None
            grads.append(g)
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        if addresses != self._separate:
            if any(row is not None for row in sharing([*params, *(g for g in grads if g is not None)])):
                return None
            self._separate = addresses
        return grads, array("q", addresses).tobytes(), any(g is None for g in grads)

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
    """Return the fastest reader of these parameters that is available."""
    try:
        from fused_sam import _cpu  # type: ignore[attr-defined]
    except ImportError:
        return PythonReader(params)
    compiled: Reader = _cpu.Reader(torch._C.TensorBase, (torch.Tensor, torch.nn.Parameter), params)
    return compiled
