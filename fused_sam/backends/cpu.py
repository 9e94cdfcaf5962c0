"""The C++ kernels (csrc/cpu) behind the backend contract: one call a primitive, for all tensors of a table."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch  # before the compiled module, so that both share one OpenMP runtime
from torch import Tensor
from torch.autograd.graph import increment_version

from .contract import LOW_PRECISION, STATUS_SIZE, Backend, Group, Table

_cpu: ModuleType | None
try:
    from fused_sam import _cpu  # type: ignore[attr-defined, no-redef]

    _reason = None
except ImportError as error:
    _cpu = None
    _reason = (
        f"the compiled module fused_sam._cpu did not load ({error}); "
        "build it with `pip install .` (needs a C++ compiler and Python's headers: apt install g++ python3-dev)"
    )

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

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        self._table(table).perturb(groups, _address(status), torch.get_num_threads())
        increment_version(table.weights)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        self._table(table).sgd(groups, _address(status), unscale, torch.get_num_threads())
        increment_version(table.weights)
        increment_version([m for m in table.momenta if m is not None])

    def restore(self, table: Table) -> None:
        self._table(table).restore(torch.get_num_threads())
        increment_version(table.weights)

    def _table(self, table: Table) -> Any:
        """The native table, with the addresses of this call's gradients."""
        assert _cpu is not None
        native = table.native
        if native is None:
            native = _cpu.Table(
                _CODES[table.weights[0].dtype],
                _CODES[table.gradient_dtype],
                [w.numel() for w in table.weights],
                table.groups,
            )
            native.set_weights(addresses(table.weights))
            if table.backups:
                native.set_backups(addresses(table.backups))
            if table.momenta:
                native.set_momenta(addresses(table.momenta))
            table.native = native
        if table.gradient_addresses:
            native.set_gradients(table.gradient_addresses)
        return native


def _address(status: Tensor) -> int:
    assert status.dtype is torch.float64 and status.numel() == STATUS_SIZE
    return status.data_ptr()
