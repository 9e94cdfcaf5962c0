"""The CUDA kernels (csrc/cuda) behind the backend contract: one launch a primitive, for all tensors of a table.

Nothing here waits for the GPU, allocates in a settled step or copies to the device: tables travel as kernel arguments,
so that a step can be captured in a torch.cuda.CUDAGraph. docs/gpu.md tells what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .contract import LOW_PRECISION, Backend, Group, Lists, Table
from .reference import Reference
from .versions import bump_versions

_cuda: ModuleType | None
try:
    _cuda = import_module("fused_sam._cuda")
    _reason = ""
except ModuleNotFoundError:
    _cuda = None
    _reason = (
        "the compiled module fused_sam._cuda is not built; build it with `FUSED_SAM_CUDA=1 pip install .`, "
        "which needs nvcc (NVIDIA's CUDA toolkit 12 or 13)"
    )
except ImportError as error:
    _cuda = None
    _reason = f"the compiled module fused_sam._cuda did not load ({error}); build it anew"

_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # csrc/core/storage.h
_WORD64 = (1 << 64) - 1


class Cuda(Backend):
    name = "cuda"
    module: ModuleType | None = _cuda

    @classmethod
    def missing(cls) -> str | None:
        if cls.module is None:
            return _reason
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        return cls.module.problem() or None

    def serves(self, device: torch.device, weight: torch.dtype, gradient: torch.dtype) -> bool:
        if device.type != "cuda" or weight not in _CODES or why_not(device) is not None:
            return False
        return gradient is weight or (weight in LOW_PRECISION and gradient is torch.float32)

    # ---- P1 to P3, P7 ------------------------------------------------------------------------------------

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
        native, workspace = self._table(table)
        native.norm(
            _host_rates(groups), self._address(status, table.weights, "status"), scaled, carry, begin, finish, eps,
            workspace.data_ptr(), self._stream(status.device),
        )  # fmt: skip

    def finish(self, status: Tensor, *, scaled: bool, carry: bool, eps: float) -> None:
        assert self.module is not None
        address = self._address(status, [status], "status")
        self.module.finish(address, scaled, carry, eps, status.device.index or 0, self._stream(status.device))

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        native, _ = self._table(table)
        native.perturb(
            _host_rates(groups), self._address(status, table.weights, "status"), table.seed & _WORD64, table.stochastic,
            self._stream(status.device),
        )  # fmt: skip
        bump_versions(table.models or table.weights)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        native, workspace = self._table(table)
        native.sgd(*self._update(table, workspace, groups, status, grad_scale))
        bump_versions(table.models or table.weights)  # master weights and momentum take no part in autograd

    def adam(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        native, workspace = self._table(table)
        native.adam(*self._update(table, workspace, groups, status, grad_scale))
        bump_versions(table.models or table.weights)

    def restore(self, table: Table) -> None:
        native, _ = self._table(table)
        native.restore(self._stream(table.weights[0].device))
        bump_versions(table.models or table.weights)

    def _update(
        self, table: Table, workspace: Tensor, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None
    ) -> tuple[Any, ...]:
        """The arguments that the updates share."""
        return (
            _host_rates(groups),
            self._device_rates(groups, table),
            self._address(status, table.weights, "status"),
            0 if grad_scale is None else self._address(grad_scale, table.weights, "gradient scale"),
            workspace.data_ptr(),
            table.seed & _WORD64,
            table.stochastic,
            self._stream(status.device),
        )

    # ---- P4 to P6 -----------------------------------------------------------------------------------------

    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        found = self._lists(lists)
        if found is None:
            return Reference().dots(lists, sums, begin=begin)
        native, workspace = found
        native.dots(
            _addresses(lists.x), _addresses(lists.y), self._address(sums, lists.x, "sums"), begin,
            workspace.data_ptr(), self._stream(sums.device),
        )  # fmt: skip
        return None

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor, status: Tensor | None = None) -> None:
        found = self._lists(lists)
        if found is None:
            return Reference().combine(lists, out, coefficients, status)
        address = self._address(coefficients, lists.x, "coefficients")
        self._combine(found[0], lists, out, address, 0.0, 0.0, status)
        return None

    def average(self, lists: Lists, decay: float, status: Tensor | None = None) -> None:
        found = self._lists(lists)
        if found is None:
            return Reference().average(lists, decay, status)
        self._combine(found[0], lists, lists.x, 0, decay, 1 - decay, status)
        return None

    def _combine(
        self, native: Any, lists: Lists, out: list[Tensor], coefficients: int, a: float, b: float, status: Tensor | None
    ) -> None:
        skip = 0 if status is None else self._address(status, lists.x, "status")
        x, y, code = _addresses(lists.x), _addresses(lists.y), _CODES[out[0].dtype]
        native.combine(x, y, code, _addresses(out), coefficients, a, b, skip, self._stream(out[0].device))
        bump_versions(out)

    # ---- within -------------------------------------------------------------------------------------------

    def _stream(self, device: torch.device) -> int:
        """The stream that torch works on now, as an integer."""
        return torch.cuda.current_stream(device).cuda_stream

    def _address(self, numbers: Tensor, beside: list[Tensor], what: str) -> int:
        """Address of fp32 numbers that a kernel reads or writes."""
        if numbers.device != beside[0].device or numbers.dtype is not torch.float32:
            raise ValueError(
                f"the {what} must be torch.float32 on {beside[0].device}, not {numbers.dtype} on {numbers.device}"
            )
        return numbers.data_ptr()

    def _device_rates(self, groups: Sequence[Group], table: Table) -> list[tuple[int, bool]] | None:
        """Where each group's learning rate lies on the device; None where all are numbers of the host."""
        if not any(isinstance(g.lr, Tensor) for g in groups):
            return None
        device = table.weights[0].device
        rates = []
        for k, group in enumerate(groups):
            lr = group.lr
            if isinstance(lr, Tensor) and (lr.device != device or lr.dtype not in (torch.float32, torch.float64)):
                raise ValueError(
                    f"lr of group {k} is a {lr.dtype} tensor on {lr.device}; it must be a number, or "
                    f"torch.float32 or torch.float64 on {device}"
                )
            rates.append((lr.data_ptr(), lr.dtype is torch.float64) if isinstance(lr, Tensor) else (0, False))
        return rates

    def _table(self, table: Table) -> tuple[Any, Tensor]:
        """The native table with the addresses of this call's gradients, and its workspace."""
        if table.native is not None:
            if table.gradient_addresses and table.gradient_addresses is not table.bound:
                table.native[0].set_gradients(table.gradient_addresses)
                table.bound = table.gradient_addresses
            return table.native
        assert self.module is not None
        state = [t for t in (*table.momenta, *table.largest) if t is not None]
        device = _one_device(table.weights, table.backups, table.models, state, table.squares, table.steps)
        native = self.module.Table(
            _CODES[table.weights[0].dtype],
            _CODES[table.gradient_dtype],
            _CODES[(table.models or table.weights)[0].dtype],
            device.index or 0,
            [w.numel() for w in table.weights],
            table.groups,
            table.streams,
        )
        native.set_weights(_addresses(table.weights))
        if table.models:
            native.set_models(_addresses(table.models))
        else:
            native.set_backups(_addresses(table.backups or table.weights))
        if table.momenta:
            native.set_momenta(_addresses(table.momenta))
        if table.squares:
            largest = table.largest or [None] * len(table.squares)
            native.set_adam(_addresses(table.squares), _addresses(largest), _addresses(table.steps))
        if table.gradient_addresses:
            native.set_gradients(table.gradient_addresses)
        made = native, _workspace(native, device)
        if not _capturing(device):
            table.native, table.bound = made, table.gradient_addresses
        return made

    def _lists(self, lists: Lists) -> tuple[Any, Tensor] | None:
        """The native lists and their workspace; None for dtypes that no kernel serves (fp64, bf16 with fp16)."""
        assert self.module is not None
        if lists.native is None:
            x, y = (_CODES.get(column[0].dtype) for column in (lists.x, lists.y))
            if x is None or y is None or not self.module.lists_served(x, y):
                return None
            device = _one_device(lists.x, lists.y)
            native = self.module.Lists(x, y, device.index or 0, [t.numel() for t in lists.x])
            made = native, _workspace(native, device)
            if _capturing(device):
                return made
            lists.native = made
        return lists.native


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on that GPU; None where they do."""
    return _device_problem(0 if device.index is None else device.index)


@cache
def _device_problem(index: int) -> str | None:
    missing = Cuda.missing()
    if missing is None and Cuda.module is not None:
        return Cuda.module.device_problem(index) or None
    return missing


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _workspace(native: Any, device: torch.device) -> Tensor:
    """Zeros for the reductions: some KB, made with the table so that no step allocates."""
    return torch.zeros(native.workspace_bytes, dtype=torch.uint8, device=device)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured. What is zeroed then is zeroed by its replays alone, in memory of its own: a
    table that is made in a capture serves one call, and steps outside make their own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _one_device(*columns: list[Tensor]) -> torch.device:
    """The tensors' device; ValueError where they have several: a kernel of one GPU does not reach another's memory."""
    devices = dict.fromkeys(t.device for column in columns for t in column)
    if len(devices) > 1:
        raise ValueError(f"tensors on {' and '.join(map(str, devices))} in one table: use one optimizer a device")
    return next(iter(devices))


def _host_rates(groups: Sequence[Group]) -> Sequence[Group]:
    """The groups with 0 for a learning rate that lies on the device: reading it here would wait for the GPU."""
    if not any(isinstance(g.lr, Tensor) for g in groups):
        return groups
    return [g._replace(lr=0.0) if isinstance(g.lr, Tensor) else g for g in groups]
