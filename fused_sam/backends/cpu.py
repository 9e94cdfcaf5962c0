"""The C++ kernels (csrc/cpu) behind the backend contract: one call a primitive, for all tensors of a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch  # before the compiled module, so that both share one OpenMP runtime
from torch import Tensor

from .contract import LOW_PRECISION, Backend, Group, Lists, Table
from .versions import bump_versions

_cpu: ModuleType | None
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
    _reason = f"the compiled module fused_sam._cpu did not load ({error}); build it anew"

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/core/storage.h


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


class Cpu(Backend):
    name = "cpu"

    @classmethod
    def missing(cls) -> str | None:
        return _reason

    def serves(self, device: torch.device, weight: torch.dtype, gradient: torch.dtype) -> bool:
        if device.type != "cpu" or weight not in _CODES:
            return False
        return gradient is weight or (weight in LOW_PRECISION and gradient is torch.float32)

    def norm(
        self,
        table: Table,
        groups: Sequence[Group],
        status: Tensor,
        *,
        scaled: bool,
        carry: bool,
        begin: bool,
        finish: bool,
        eps: float,
    ) -> None:
        native = self._table(table)
        native.norm(groups, _address(status), scaled, carry, begin, finish, eps, torch.get_num_threads())

    def finish(self, status: Tensor, *, scaled: bool, carry: bool, eps: float) -> None:
        assert _cpu is not None
        _cpu.finish(_address(status), scaled, carry, eps)

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        self._table(table).perturb(groups, _address(status), torch.get_num_threads())
        bump_versions(table.models or table.weights)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        self._table(table).sgd(groups, _address(status), _reciprocal(grad_scale), torch.get_num_threads())
        _bump_updated(table)

    def adam(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        self._table(table).adam(groups, _address(status), _reciprocal(grad_scale), torch.get_num_threads())
        _bump_updated(table)

    def restore(self, table: Table) -> None:
        self._table(table).restore(torch.get_num_threads())
        bump_versions(table.models or table.weights)

    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        native, x, y = _columns(lists)
        native.dots(*x, *y, _address(sums), begin, torch.get_num_threads())

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor, status: Tensor | None = None) -> None:
        native, x, y = _columns(lists)
        a, b = coefficients[:2].tolist()
        skip = 0 if status is None else _address(status)
        native.combine(*x, *y, _CODES[out[0].dtype], addresses(out), a, b, skip, torch.get_num_threads())
        bump_versions(out)

    def average(self, lists: Lists, decay: float, status: Tensor | None = None) -> None:
        native, x, y = _columns(lists)
        skip = 0 if status is None else _address(status)
        native.combine(*x, *y, *x, decay, 1 - decay, skip, torch.get_num_threads())
        bump_versions(lists.x)

    def _table(self, table: Table) -> Any:
        """The native table, with the addresses of this call's gradients."""
        assert _cpu is not None
        native = table.native
        if native is None:
            weight = table.weights[0].dtype
            native = _cpu.Table(
                _CODES[weight],
                _CODES[table.gradient_dtype],
                _CODES[table.models[0].dtype if table.models else weight],
                [w.numel() for w in table.weights],
                table.groups,
            )
            for name in ("weights", "backups", "models", "momenta", "squares", "largest", "steps"):
                column = getattr(table, name)
                if column:
                    getattr(native, f"set_{name}")(addresses(column))
            if table.streams:
                native.set_draws(table.seed, table.streams, table.stochastic)
            table.native = native
        if table.gradient_addresses and table.gradient_addresses is not table.bound:
            native.set_gradients(table.gradient_addresses)
            table.bound = table.gradient_addresses
        return native


def _reciprocal(grad_scale: Tensor | None) -> float:
    return 1.0 if grad_scale is None else 1 / float(grad_scale)


def _bump_updated(table: Table) -> None:
    bump_versions(table.weights)  # optimizer state takes no part in autograd
    if table.models:
        bump_versions(table.models)


def _columns(lists: Lists) -> tuple[Any, tuple[int, list[int]], tuple[int, list[int]]]:
    assert _cpu is not None
    if lists.native is None:
        lists.native = _cpu.Lists([t.numel() for t in lists.x])
    x, y = ((_CODES[column[0].dtype], addresses(column)) for column in (lists.x, lists.y))
    return lists.native, x, y


def _address(numbers: Tensor) -> int:
    assert numbers.dtype is torch.float64
    return numbers.data_ptr()
