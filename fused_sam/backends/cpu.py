"""The C++ kernels (csrc/cpu) behind the backend contract: one call per primitive, for all tensors of a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch  # before the compiled module, so that both share one OpenMP runtime
from torch import Tensor

from .contract import (
    LOW_PRECISION,
    Backend,
    PerturbGroup,
    Status,
    Table,
    VectorPair,
    bump_versions,
)
from .native import CODES, address_of, addresses, fill

_cpu: ModuleType | Any
try:
    _cpu = import_module("fused_sam._cpu")
    _reason = None
except ModuleNotFoundError:
    _cpu = None
    _reason = (
        "the compiled module fused_sam._cpu is not built; build it with `pip install .`, "
        "which needs a C++ compiler and Python's headers (apt install g++ python3-dev)"
    )
except ImportError as error:
    _cpu = None
    _reason = f"the compiled module fused_sam._cpu did not load ({error}); build it again"


class Cpu(Backend):
    """C++ kernels for the CPU, in the best instruction set of the processor.

    Host time is most of a small model's step, so each primitive is one call into C++ and one helper at most.
    """

    name = "cpu"

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return _reason

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        if device.type != "cpu" or dtype not in CODES:
            return False
        return grad_dtype is dtype or (dtype in LOW_PRECISION and grad_dtype is torch.float32)

    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        _native(table).norm(groups, status.address, False, False, False, 0.0, torch.get_num_threads())

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        _cpu.finish_norm(status.address, ascent, keep_skip, eps)

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
        last, threads = len(tables) - 1, torch.get_num_threads()
        for i, table in enumerate(tables):
            _native(table).norm(groups, status.address, i == 0, i == last, keep_skip, eps, threads)

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        assert sums.dtype is torch.float64 and sums.is_contiguous()
        unbias, threads = address_of(table.unbias), torch.get_num_threads()
        _native(table).squares(groups, unbias, sums.data_ptr(), weights, threads)

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        if table.factors is None and table.unbias is None:
            _native(table).perturb(groups, status.address, torch.get_num_threads())
        else:
            factors, unbias = address_of(table.factors), address_of(table.unbias)
            _native(table).perturb(groups, status.address, torch.get_num_threads(), factors, unbias)
        bump_versions(table.params)

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        assert table.rule is not None
        getattr(_native(table), table.rule.name)(groups, status.address, unscale, max_norm, torch.get_num_threads())
        bump_versions(table.params)
        bump_versions(table.masters)

    def restore(self, table: Table) -> None:
        _native(table).restore(torch.get_num_threads())
        bump_versions(table.params)

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        assert sums.dtype is torch.float64
        native, x, y = _native_pair(pair)
        native.dot(*x, *y, sums.data_ptr(), reset, torch.get_num_threads())

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        native, x, y = _native_pair(pair)
        a, b = coefficients[:2].tolist() if isinstance(coefficients, Tensor) else coefficients
        skip = 0 if status is None else status.address
        native.axpby(*x, *y, CODES[out[0].dtype], addresses(out), a, b, skip, torch.get_num_threads())
        bump_versions(out)

    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        native, x, y = _native_pair(pair)
        skip = 0 if status is None else status.address
        native.axpby(*x, *y, *x, decay, 1 - decay, skip, torch.get_num_threads())
        bump_versions(pair.x)


def _native(table: Table) -> Any:
    """Return the native table, with the addresses of this call's gradients."""
    native = table.native
    if native is None:
        native = table.native = _build(table)
    grads = table.grad_addresses
    if grads and grads is not table.bound_grads:
        native.set_grads(grads)
        table.bound_grads = grads
    return native


def _build(table: Table) -> Any:
    dtype = table.params[0].dtype
    native = _cpu.Table(
        CODES[dtype],
        CODES[table.grad_dtype],
        CODES[table.masters[0].dtype if table.masters else dtype],
        [p.numel() for p in table.params],
        table.group_ids,
    )
    fill(native, table)
    if table.rng_streams:
        native.set_rng(table.seed, table.rng_streams, table.stochastic_rounding)
    return native


def _native_pair(pair: VectorPair) -> tuple[Any, tuple[int, list[int]], tuple[int, list[int]]]:
    """Return the native pair, and each column's dtype code and addresses."""
    if pair.native is None:
        pair.native = _cpu.VectorPair([t.numel() for t in pair.x])
    x, y = ((CODES[column[0].dtype], addresses(column)) for column in (pair.x, pair.y))
    return pair.native, x, y
