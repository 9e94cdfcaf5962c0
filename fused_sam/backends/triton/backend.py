"""The Triton kernels behind the backend contract: no compiler of CUDA needed, on NVIDIA, AMD and Intel GPUs.

One launch a primitive for all tensors and all groups of a table. With TRITON_INTERPRET=1 in the environment when Python
starts, Triton's interpreter runs the same kernels on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION, Backend, Group, Lists, Table
from fused_sam.backends.reference import Reference
from fused_sam.backends.versions import bump_versions

from .memory import Memory, Reserve
from .tables import Native, NativeLists, NativeTable, copy_rates, device_of

_OLDEST = (3, 6)  # the launches below are those of Triton 3.6 and newer
_SERVED = (torch.float32, *LOW_PRECISION)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _missing_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; torch for Linux with CUDA, ROCm or XPU brings it, else `pip install triton`"
    try:
        import triton
    except Exception as error:  # a broken install may raise anything
        return f"triton does not import ({type(error).__name__}: {error}); reinstall it"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is too old; 3.6 or newer is needed, which torch 2.10 and newer bring"
    return None


def _missing_gpu() -> str | None:
    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return (
            "torch finds no GPU; to try the kernels on CPU tensors, slowly, set TRITON_INTERPRET=1 before Python starts"
        )
    # Triton compiles a small launcher the first time it runs.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler at run time and found none; install gcc or clang, or name one in CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "triton needs Python's headers at run time; install python3-dev (or python3-devel)"
    return None


class Triton(Backend):
    name = "triton"

    def __init__(self) -> None:
        self._reserve = Reserve()
        self._slow = Reference()
        self._launchers: dict[torch.device, dict[Any, Any]] = {}  # of finish, which has no table

    @classmethod
    def missing(cls) -> str | None:
        return _missing_triton() or (None if _interpreting() else _missing_gpu())

    def serves(self, device: torch.device, weight: torch.dtype, gradient: torch.dtype) -> bool:
        if device.type not in (("cpu",) if _interpreting() else ("cuda", "xpu")):
            return False
        return weight in _SERVED and (gradient is weight or (weight in LOW_PRECISION and gradient is torch.float32))

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
        native = _native(table)
        with native.device.current():
            memory = native.for_norm(table, groups, self._reserve, climb=scaled)
            flags = begin + 2 * finish + 4 * carry
            _run(
                native, memory, "norm", native.programs,
                ("owner", "rows", "gradients", "hyper", "slots", "counter", status, native.blocks.count, flags, eps),
                (table.weights[0].dtype, table.gradient_dtype, scaled, native.blocks.size, native.device.slots),
            )  # fmt: skip

    def finish(self, status: Tensor, *, scaled: bool, carry: bool, eps: float) -> None:
        device = device_of(status.device)
        with device.current():
            arguments = (status, 4 * carry, eps)
            launchers = self._launchers.setdefault(status.device, {})
            launcher = launchers.get(("finish", (scaled,)))
            if launcher is None:
                _first(launchers, "finish", 1, arguments, (scaled,), 1)
            else:
                run, values = launcher
                run(status.data_ptr(), *arguments[1:], *values)

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.after_norm(table, groups, self._reserve, climb=True)
            _run(
                native, memory, "perturb", native.blocks.count,
                ("owner", "rows", "gradients", "hyper", status),
                (*_types(table, native), memory.chooses, native.blocks.size),
            )  # fmt: skip
        bump_versions(table.models or table.weights)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.after_norm(table, groups, self._reserve, climb=False)
            copy_rates(memory, groups)
            _run(
                native, memory, "sgd", native.blocks.count,
                ("owner", "rows", "gradients", "hyper", "rates", status, _scale(grad_scale, status)),
                (*_types(table, native), native.blocks.size),
            )  # fmt: skip
        _updated(table)  # optimizer state takes no part in autograd

    def adam(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.after_norm(table, groups, self._reserve, climb=False)
            copy_rates(memory, groups)
            _run(
                native, memory, "adam", native.blocks.count,
                (
                    "owner", "rows", "gradients", "hyper", "rates", "counter", status, _scale(grad_scale, status),
                    len(table.weights),
                ),
                (*_types(table, native), native.with_largest, native.blocks.size),
            )  # fmt: skip
        _updated(table)

    def restore(self, table: Table) -> None:
        native = _native(table)
        with native.device.current():
            memory = native.for_restore(table, self._reserve)
            _run(
                native, memory, "restore", native.blocks.count,
                ("owner", "rows"), (table.weights[0].dtype, native.model, native.blocks.size),
            )  # fmt: skip
        bump_versions(table.models or table.weights)

    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        if not _served(lists):
            self._slow.dots(lists, sums, begin=begin)
            return
        native = _native_lists(lists)
        with native.device.current():
            memory = native.memory(lists.x, lists.y, lists.x, self._reserve)
            _run(
                native, memory, "dots", native.programs,
                ("owner", "rows", "xs", "ys", "slots", "counter", sums, native.blocks.count, int(begin)),
                (lists.x[0].dtype, lists.y[0].dtype, native.blocks.size, native.device.slots),
            )  # fmt: skip

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor, status: Tensor | None = None) -> None:
        if not _served(lists):
            self._slow.combine(lists, out, coefficients, status)
            return
        native = _native_lists(lists)
        with native.device.current():
            memory = native.memory(lists.x, lists.y, out, self._reserve)
            _run(
                native, memory, "combine", native.blocks.count,
                ("owner", "rows", "xs", "ys", "outs", coefficients, "unit" if status is None else status),
                (lists.x[0].dtype, lists.y[0].dtype, out[0].dtype, status is not None, native.blocks.size),
            )  # fmt: skip
        bump_versions(out)

    def average(self, lists: Lists, decay: float, status: Tensor | None = None) -> None:
        if not _served(lists):
            self._slow.average(lists, decay, status)
            return
        native = _native_lists(lists)
        with native.device.current():
            memory = native.memory(lists.x, lists.y, lists.x, self._reserve)
            _run(
                native, memory, "average", native.blocks.count,
                ("owner", "rows", "xs", "ys", decay, 1 - decay, "unit" if status is None else status),
                (lists.x[0].dtype, lists.y[0].dtype, status is not None, native.blocks.size),
            )  # fmt: skip
        bump_versions(lists.x)


def _native(table: Table) -> NativeTable:
    if table.native is None:
        table.native = NativeTable(table)
    return table.native


def _native_lists(lists: Lists) -> NativeLists:
    if lists.native is None:
        lists.native = NativeLists(lists)
    return lists.native


def _types(table: Table, native: NativeTable) -> tuple[Any, ...]:
    """The dtypes of weights, gradients and models, and whether weights round at random."""
    weight = table.weights[0].dtype
    return weight, table.gradient_dtype, native.model, table.stochastic and weight in LOW_PRECISION


def _scale(grad_scale: Tensor | None, status: Tensor) -> Tensor | str:
    return "unit" if grad_scale is None else grad_scale.to(status.device, torch.float32)


def _updated(table: Table) -> None:
    bump_versions(table.weights)
    if table.models:
        bump_versions(table.models)


def _served(lists: Lists) -> bool:
    return lists.x[0].dtype in _SERVED and lists.y[0].dtype in _SERVED


@cache
def _kernel(name: str) -> Any:
    from . import passes, updates, vectors

    return next(getattr(m, name) for m in (passes, updates, vectors) if hasattr(m, name))


def _run(
    native: Native,
    memory: Memory,
    name: str,
    programs: int,
    arguments: tuple[str | Tensor | float, ...],
    constants: tuple[Any, ...],
) -> None:
    """Run a kernel over a table. An argument that is a string is the array of that name in `memory`.

    Triton binds and inspects the arguments of every launch anew, 20 us of Python for kernels like these. They are made
    so that what is compiled once fits every call; so all but the first go straight to it, with plain addresses.
    """
    launcher = native.launchers.get((name, constants))
    if launcher is not None:
        run, values = launcher
        at = memory.addresses
        run(*[at[a] if type(a) is str else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], *values)
        return
    tensors = tuple(memory.tensor(a) if isinstance(a, str) else a for a in arguments)
    _first(native.launchers, name, programs, tensors, constants, native.blocks.warps)


def _first(
    launchers: dict[Any, Any],
    name: str,
    programs: int,
    arguments: tuple[Tensor | float, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Run a kernel by Triton's own launch, and keep how to do so without it."""
    import triton.language as tl

    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    values = tuple(types.get(c, c) if isinstance(c, torch.dtype) else c for c in constants)
    compiled = _kernel(name)[(programs,)](*arguments, *values, num_warps=warps, enable_fp_fusion=True)
    if not _interpreting():
        launchers[(name, constants)] = (compiled[(programs, 1, 1)], values)
