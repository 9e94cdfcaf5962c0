"""The Triton kernels behind the backend contract. They need no CUDA compiler, and run on NVIDIA, AMD and Intel GPUs.

Each primitive is one launch for all tensors and all groups of a table. With TRITON_INTERPRET=1 in the environment when
Python starts, Triton's interpreter runs the same kernels on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import (
    ADAM,
    LOW_PRECISION,
    Backend,
    PerturbGroup,
    Status,
    Table,
    VectorPair,
    bump_versions,
)
from fused_sam.backends.reference import Reference

from . import layout, requirements
from .device import device_of
from .launch import Launchers, launch, launch_once
from .memory import Reserve
from .tables import NativePair, NativeTable, copy_lrs

_DTYPES = (torch.float32, *LOW_PRECISION)

# The arrays that the kernels find their block in, and those that norm, perturb and updates read besides.
_BLOCKS = ("block_row", "rows")
_TABLE = (*_BLOCKS, "grads", "groups")


class Triton(Backend):
    """Triton kernels for GPUs."""

    name = "triton"

    def __init__(self) -> None:
        self._reserve = Reserve()
        self._reference = Reference()  # for vectors in fp64
        self._launchers: dict[torch.device, Launchers] = {}  # of finish_norm, which has no table

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return requirements.unavailable_reason()

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        if device.type not in (("cpu",) if requirements.interpreting() else ("cuda", "xpu")):
            return False
        return dtype in _DTYPES and (grad_dtype is dtype or (dtype in LOW_PRECISION and grad_dtype is torch.float32))

    # ---- norm, perturb, restore -----------------------------------------------------------------------------------

    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        self._norm(table, groups, status, flags=0, eps=0.0)

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        with device_of(status.device).current():
            arguments = (status.values, layout.KEEP_SKIP * keep_skip, eps)
            launch_once(self._launchers.setdefault(status.device, {}), "finish_norm", arguments, (ascent,))

    def norm(
        self,
        tables: Sequence[Table],
        groups: Sequence[PerturbGroup] | None,
        status: Status,
        *,
        keep_skip: bool,
        eps: float,
    ) -> None:
        if not tables:
            super().norm(tables, groups, status, keep_skip=keep_skip, eps=eps)
        for i, table in enumerate(tables):
            flags = layout.RESET * (i == 0) + layout.FINISH * (i == len(tables) - 1) + layout.KEEP_SKIP * keep_skip
            self._norm(table, groups, status, flags=flags, eps=eps)

    def _norm(
        self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status, *, flags: int, eps: float
    ) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.for_norm(table, groups, self._reserve)
            launch(
                native, memory, "norm", native.programs,
                (*_TABLE, "slots", "ticket", status.values, native.blocks.count, flags, eps),
                (*_dtypes(table, native), groups is not None, native.blocks.size, native.device.slots),
            )  # fmt: skip

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        native = _native(table)
        count = native.blocks.count
        partial = torch.empty((1 + weights) * count, dtype=sums.dtype, device=sums.device)
        with native.device.current():
            memory = native.for_norm(table, groups, self._reserve)
            launch(
                native, memory, "squares", count,
                (*_TABLE, sums if table.unbias is None else table.unbias, partial, count),
                (*_dtypes(table, native), table.unbias is not None, weights, native.blocks.size),
            )  # fmt: skip
            launch(
                native, memory, "row_sums", len(table.params),
                ("rows", partial, sums, count, len(table.params)), (weights, native.blocks.size),
            )  # fmt: skip

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        native, factors, unbias = _native(table), table.factors, table.unbias
        with native.device.current():
            memory = native.after_norm(table, groups, self._reserve)
            launch(
                native, memory, "perturb", native.blocks.count,
                (*_TABLE, status.values, status.values if factors is None else factors,
                 status.values if unbias is None else unbias),
                (*_dtypes(table, native), _rounds(table), memory.masked, factors is not None, unbias is not None,
                 native.blocks.size),
            )  # fmt: skip
        bump_versions(table.params)

    def restore(self, table: Table) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.for_restore(table, self._reserve)
            constants = (table.params[0].dtype, native.masters, native.blocks.size)
            launch(native, memory, "restore", native.blocks.count, _BLOCKS, constants)
        bump_versions(table.params)

    # ---- updates --------------------------------------------------------------------------------------------------

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        native, rule = _native(table), table.rule
        assert rule is not None
        # Adam's kernel counts steps, and is compiled for whether a group has amsgrad.
        more = ("ticket", len(table.params)) if rule is ADAM else ()
        more_constants = (native.amsgrad,) if rule is ADAM else ()
        with native.device.current():
            memory = native.after_norm(table, groups, self._reserve)
            copy_lrs(memory, groups)
            scale = "one" if grad_scale is None else grad_scale.to(status.device, torch.float32)
            limit = max_norm if max_norm <= 3e38 else math.inf  # what fp32 holds
            launch(
                native, memory, rule.name, native.blocks.count,
                (*_TABLE, "lrs", status.values, scale, limit, *more),
                (*_dtypes(table, native), _rounds(table), *more_constants, native.blocks.size),
            )  # fmt: skip
        bump_versions(table.params)
        bump_versions(table.masters)  # optimizer state takes no part in autograd

    # ---- vectors --------------------------------------------------------------------------------------------------

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        if not _has_kernels(pair):
            self._reference.dot(pair, sums, reset=reset)
            return
        native = _native_pair(pair)
        with native.device.current():
            memory = native.memory(pair.x, pair.y, pair.x, self._reserve)
            launch(
                native, memory, "dot", native.programs,
                (*_BLOCKS, "x", "y", "slots", "ticket", sums, native.blocks.count, int(reset)),
                (pair.x[0].dtype, pair.y[0].dtype, native.blocks.size, native.device.slots),
            )  # fmt: skip

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        if not _has_kernels(pair):
            self._reference.axpby(pair, out, coefficients, status)
            return
        native = _native_pair(pair)
        with native.device.current():
            memory = native.memory(pair.x, pair.y, out, self._reserve)
            on_host = not isinstance(coefficients, Tensor)
            numbers = ("one", *coefficients) if on_host else (coefficients, 0.0, 0.0)
            launch(
                native, memory, "axpby", native.blocks.count,
                (*_BLOCKS, "x", "y", "out", *numbers, "one" if status is None else status.values),
                (pair.x[0].dtype, pair.y[0].dtype, out[0].dtype, on_host, status is not None, native.blocks.size),
            )  # fmt: skip
        bump_versions(out)

    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        if _has_kernels(pair):
            self.axpby(pair, pair.x, (decay, 1 - decay), status)
        else:
            self._reference.ema(pair, decay, status)


def _native(table: Table) -> NativeTable:
    if table.native is None:
        table.native = NativeTable(table)
    return table.native


def _native_pair(pair: VectorPair) -> NativePair:
    if pair.native is None:
        pair.native = NativePair(pair)
    return pair.native


def _dtypes(table: Table, native: NativeTable) -> tuple[Any, ...]:
    """Return the dtypes of params and gradients, and True if there are masters."""
    return table.params[0].dtype, table.grad_dtype, native.masters


def _rounds(table: Table) -> bool:
    """Return True if the params are rounded stochastically."""
    return table.stochastic_rounding and table.params[0].dtype in LOW_PRECISION


def _has_kernels(pair: VectorPair) -> bool:
    return pair.x[0].dtype in _DTYPES and pair.y[0].dtype in _DTYPES
