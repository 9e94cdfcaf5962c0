"""The CUDA kernels (csrc/cuda) behind the backend contract: one launch per primitive, for all tensors of a table.

Nothing here waits for the GPU, and after the first steps nothing allocates or copies to the device. Tables are kernel
arguments, so that a step can be captured in a torch.cuda.CUDAGraph. docs/gpu.md has the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
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
from .native import CODES, addresses, fill
from .reference import Reference

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
    _reason = f"the compiled module fused_sam._cuda did not load ({error}); build it again"

_CODES = {dtype: code for dtype, code in CODES.items() if dtype is not torch.float64}
_WORD64 = (1 << 64) - 1


class Cuda(Backend):
    """CUDA C++ kernels for NVIDIA GPUs, from compute capability 8.0 on."""

    name = "cuda"
    module: ModuleType | None = _cuda

    @classmethod
    def unavailable_reason(cls) -> str | None:
        if cls.module is None:
            return _reason
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        return cls.module.unavailable_reason() or None

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        if device.type != "cuda" or dtype not in _CODES or why_not(device) is not None:
            return False
        return grad_dtype is dtype or (dtype in LOW_PRECISION and grad_dtype is torch.float32)

    # ---- the primitives of a step ---------------------------------------------------------------------------

    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        self._norm(table, groups, status, False, False, False, 0.0)

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        assert self.module is not None
        address, index = _status(status, status.device), status.device.index or 0
        self.module.finish_norm(address, ascent, keep_skip, eps, index, self._stream(status.device))

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
        last = len(tables) - 1
        for i, table in enumerate(tables):
            self._norm(table, groups, status, i == 0, i == last, keep_skip, eps)

    def _norm(
        self,
        table: Table,
        groups: Sequence[PerturbGroup] | None,
        status: Status,
        reset: bool,
        finish: bool,
        keep_skip: bool,
        eps: float,
    ) -> None:
        native, workspace = self._table(table)
        device = table.params[0].device
        native.norm(
            groups, _status(status, device), reset, finish, keep_skip, eps, workspace.data_ptr(), self._stream(device)
        )

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        native, workspace = self._table(table)
        device = table.params[0].device
        native.squares(
            groups, 0 if table.unbias is None else _address(table.unbias, device, "unbias"),
            _address(sums, device, "sums"), weights, workspace.data_ptr(), self._stream(device),
        )  # fmt: skip

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        native, _ = self._table(table)
        device = table.params[0].device
        native.perturb(
            groups,
            _status(status, device),
            table.seed & _WORD64,
            table.stochastic_rounding,
            self._stream(device),
            0 if table.factors is None else _address(table.factors, device, "factors"),
            0 if table.unbias is None else _address(table.unbias, device, "unbias"),
            status.marks_address,
        )
        bump_versions(table.params)

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        native, workspace = self._table(table)
        device = table.params[0].device
        numbers, rates = _rates(groups, device)
        assert table.rule is not None
        getattr(native, table.rule.name)(
            numbers,
            rates,
            _status(status, device),
            0 if grad_scale is None else _address(grad_scale, device, "gradient scale"),
            max_norm,
            workspace.data_ptr(),
            table.seed & _WORD64,
            table.stochastic_rounding,
            self._stream(device),
            status.marks_address,
        )
        bump_versions(table.params)
        bump_versions(table.masters)

    def restore(self, table: Table) -> None:
        native, _ = self._table(table)
        native.restore(self._stream(table.params[0].device))
        bump_versions(table.params)

    # ---- the primitives over two vectors --------------------------------------------------------------------

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        found = self._pair(pair)
        if found is None:
            return Reference().dot(pair, sums, reset=reset)
        native, workspace = found
        device = pair.x[0].device
        native.dot(
            addresses(pair.x), addresses(pair.y), _address(sums, device, "sums"), reset, workspace.data_ptr(),
            self._stream(device),
        )  # fmt: skip
        return None

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        found = self._pair(pair)
        if found is None:
            return Reference().axpby(pair, out, coefficients, status)
        device = pair.x[0].device
        address, a, b = 0, 0.0, 0.0
        if isinstance(coefficients, Tensor):
            address = _address(coefficients, device, "coefficients")
        else:
            a, b = coefficients
        skip, marks = (0, 0) if status is None else (_status(status, device), status.marks_address)
        x, y, code = addresses(pair.x), addresses(pair.y), _CODES[out[0].dtype]
        found[0].axpby(x, y, code, addresses(out), address, a, b, skip, self._stream(device), marks)
        bump_versions(out)
        return None

    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        if self._pair(pair) is None:
            Reference().ema(pair, decay, status)
        else:
            self.axpby(pair, pair.x, (decay, 1 - decay), status)

    # ---- native tables --------------------------------------------------------------------------------------

    def _stream(self, device: torch.device) -> int:
        """Return torch's current stream, as an integer."""
        return torch.cuda.current_stream(device).cuda_stream

    def _table(self, table: Table) -> tuple[Any, Tensor]:
        """Return the native table, with the addresses of this call's gradients, and its workspace."""
        grads = table.grad_addresses
        if table.native is not None:
            if grads and grads is not table.bound_grads:
                table.native[0].set_grads(grads)
                table.bound_grads = grads
            return table.native
        device = _one_device(
            table.params, table.backups, table.masters, table.second_moments, *table.state.values()
        )
        native = self._build(table, device)
        if grads:
            native.set_grads(grads)
        made = native, _workspace(native, device)
        if not _capturing(device):
            table.native, table.bound_grads = made, grads
        return made

    def _build(self, table: Table, device: torch.device) -> Any:
        assert self.module is not None
        native = self.module.Table(
            _CODES[table.params[0].dtype],
            _CODES[table.grad_dtype],
            _CODES[(table.masters or table.params)[0].dtype],
            device.index or 0,
            [p.numel() for p in table.params],
            table.group_ids,
            table.rng_streams,
        )
        fill(native, table)
        return native

    def _pair(self, pair: VectorPair) -> tuple[Any, Tensor] | None:
        """Return the native pair and its workspace; None for dtypes without kernels (fp64, bf16 with fp16)."""
        assert self.module is not None
        if pair.native is None:
            x, y = (_CODES.get(column[0].dtype) for column in (pair.x, pair.y))
            if x is None or y is None or not self.module.supports_vectors(x, y):
                return None
            device = _one_device(pair.x, pair.y)
            native = self.module.VectorPair(x, y, device.index or 0, [t.numel() for t in pair.x])
            made = native, _workspace(native, device)
            if _capturing(device):
                return made
            pair.native = made
        return pair.native


def why_not(device: torch.device) -> str | None:
    """Return why the kernels do not run on that GPU; None if they do."""
    return _device_reason(0 if device.index is None else device.index)


@cache
def _device_reason(index: int) -> str | None:
    reason = Cuda.unavailable_reason()
    if reason is None and Cuda.module is not None:
        return Cuda.module.device_unavailable_reason(index) or None
    return reason


def _address(numbers: Tensor, device: torch.device, what: str) -> int:
    """Return the address of fp32 numbers that a kernel reads or writes."""
    if numbers.device != device or numbers.dtype is not torch.float32:
        raise ValueError(f"the {what} must be torch.float32 on {device}, not {numbers.dtype} on {numbers.device}")
    return numbers.data_ptr()


def _status(status: Status, device: torch.device) -> int:
    return _address(status.values, device, "status")


def _rates(
    groups: Sequence[Any], device: torch.device
) -> tuple[Sequence[Any], list[tuple[int, bool]] | None]:
    """Return the groups as numbers of the host, and where each group's learning rate is on the device.

    Reading a learning rate here would wait for the GPU: a group that has one on the device has 0 instead. The second
    result is None if no group has one.
    """
    if not any(isinstance(g.lr, Tensor) for g in groups):
        return groups, None
    rates = []
    for k, group in enumerate(groups):
        lr = group.lr
        if isinstance(lr, Tensor) and (lr.device != device or lr.dtype not in (torch.float32, torch.float64)):
            raise ValueError(
                f"lr of group {k} is a {lr.dtype} tensor on {lr.device}; it must be a number, or "
                f"torch.float32 or torch.float64 on {device}"
            )
        rates.append((lr.data_ptr(), lr.dtype is torch.float64) if isinstance(lr, Tensor) else (0, False))
    return [g._replace(lr=0.0) if isinstance(g.lr, Tensor) else g for g in groups], rates


def _workspace(native: Any, device: torch.device) -> Tensor:
    """Return zeros for the reductions: some KB, allocated with the table so that no step allocates."""
    return torch.zeros(native.workspace_bytes, dtype=torch.uint8, device=device)


def _capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is captured.

    Zeros that are allocated then are written only by the graph's replays, in the graph's own memory. A table that is
    built in a capture therefore serves one call, and steps outside the graph build their own.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _one_device(*columns: Sequence[Tensor | None]) -> torch.device:
    """Return the tensors' device; ValueError if they have several: a kernel of one GPU cannot read another's memory."""
    devices = dict.fromkeys(t.device for column in columns for t in column if t is not None)
    if len(devices) > 1:
        raise ValueError(f"tensors on {' and '.join(map(str, devices))} in one table: use one optimizer per device")
    return next(iter(devices))
