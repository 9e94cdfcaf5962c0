"""The Triton backend with PTX in place of a GPU: Triton compiles for sm_90, and its launches run in support.ptx."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from fused_sam import backends
from fused_sam.backends.contract import PerturbGroup, Status, Table, VectorPair
from fused_sam.backends.triton import backend as backend_module
from fused_sam.backends.triton import memory, tables
from fused_sam.backends.triton.backend import Triton

from .fp32_numbers import Fp32Numbers
from .ptx import Kernel, Options, Region, kernels_of, launch
from .ptx_regions import regions_of, table_regions
from .triton_driver import RecordingDriver, running_on

NAME = "triton-ptx"

_FORMS = {"i1": "<i", "i8": "<b", "i16": "<h", "i32": "<i", "u32": "<I", "i64": "<q", "fp32": "<f"}


@cache
def _kernel(path: str) -> Kernel:
    (kernel,) = kernels_of(Path(path).read_text()).values()
    return kernel


def packed(kernel: Kernel, types: Sequence[str], arguments: Sequence[Any]) -> bytes:
    """Return arguments as the kernel's parameters lie in memory. Triton's scratch pointers, the last two, are null."""
    room = bytearray(kernel.parameter_bytes)
    values = [(t, a) for t, a in zip(types, arguments, strict=True) if t != "constexpr"]
    assert len(values) + 2 == len(kernel.parameters), (kernel.name, types, kernel.parameters)
    for (kind, value), parameter in zip(values, kernel.parameters, strict=False):
        if kind.startswith("*"):
            word = struct.pack("<Q", value.data_ptr() if isinstance(value, Tensor) else value)
        else:
            word = struct.pack(_FORMS[kind], value)
        assert len(word) == parameter.size, (kernel.name, kind, parameter)
        room[parameter.offset : parameter.offset + parameter.size] = word
    return bytes(room)


@dataclass
class LaunchingDriver(RecordingDriver):
    """A driver whose launches run in the interpreter.

    Attributes:
        regions: returns the memory of a launch.
        change: returns the kernel to run in place of a compiled one.
    """

    options: Options = field(default_factory=lambda: Options(replicas=True))
    regions: Callable[[], list[Region]] = list
    passed: list[Region] = field(default_factory=list)  # of the tensors that the launch is called with
    change: Callable[[Kernel], Kernel] = field(default=lambda kernel: kernel)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names, name = source.fn.arg_names, source.fn.__name__
        types = [source.signature[n] for n in names]
        files = get_cache_manager(metadata.hash).get_group(f"{name}.json")
        kernel = _kernel(files[f"{name}.ptx"])

        def run(programs: int, *rest: Any) -> None:
            arguments = rest[-len(names) :]
            content, regions = packed(kernel, types, arguments), [*self.regions(), *self.passed]
            threads = metadata.num_warps * 32
            launch(
                self.change(kernel), programs, threads, content, regions, shared=metadata.shared,
                options=self.options,
            )  # fmt: skip

        return run


class _Launching(Triton):
    """Tells the driver the memory of each call's tensors."""

    driver: LaunchingDriver

    @contextmanager
    def _with(self, *columns: tuple[str, Sequence[Any]], of: Table | VectorPair | None = None) -> Iterator[None]:
        known = [region for name, tensors in columns for region in regions_of(name, tensors)]
        if isinstance(of, Table):
            known += table_regions(of)

        def regions() -> list[Region]:  # at the launch, when the table's own memory exists
            return known if of is None else [*known, *regions_of("the table", [of.native._memory.words])]

        self.driver.regions = regions
        try:
            yield
        finally:
            self.driver.regions = list

    def _norm(self, table: Table, groups: Any, status: Status, *, flags: int, eps: float) -> None:
        with self._with(("status", [status.values]), of=table):
            super()._norm(table, groups, status, flags=flags, eps=eps)

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        with self._with(("status", [status.values])):
            super().finish_norm(status, ascent=ascent, keep_skip=keep_skip, eps=eps)

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        with self._with(("sums", [sums]), of=table):
            super().squares(table, groups, sums, weights=weights)

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        with self._with(("status", [status.values]), of=table):
            super().perturb(table, groups, status)

    def restore(self, table: Table) -> None:
        with self._with(of=table):
            super().restore(table)

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        numbers = ("status", [status.values]), ("grad_scale", [grad_scale]), ("lr", [g.lr for g in groups])
        with self._with(*numbers, of=table):
            super().update(table, groups, status, grad_scale, max_norm)

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        with self._with(("x", pair.x), ("y", pair.y), ("sums", [sums]), of=pair):
            super().dot(pair, sums, reset=reset)

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        numbers = ("coefficients", [coefficients]), ("status", [None if status is None else status.values])
        with self._with(("x", pair.x), ("y", pair.y), ("out", out), *numbers, of=pair):
            super().axpby(pair, out, coefficients, status)


class TritonPtx(Fp32Numbers, _Launching):
    """The kernels' PTX on CPU tensors."""

    name = NAME

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        return device.type == "cpu" and super().supports(torch.device("cuda"), dtype, grad_dtype)

    def has_kernels(self, pair: VectorPair) -> bool:
        return backend_module._has_kernels(pair)


@contextmanager
def ptx_driver() -> Iterator[LaunchingDriver]:
    """Let Triton launch into the interpreter, and know the backend as "triton-ptx"."""
    driver = LaunchingDriver()
    TritonPtx.driver = driver
    with pytest.MonkeyPatch.context() as patch, running_on(driver):
        for module in (memory, tables):  # of the slots: on a GPU they are fp32
            patch.setattr(module, "status_dtype", lambda device: torch.float32)
        plain = backend_module.launch

        def noting(*how: Any) -> None:
            *_, arguments, _ = how
            driver.passed = regions_of("an argument", arguments)
            plain(*how)

        patch.setattr(backend_module, "launch", noting)
        patch.setitem(backends.BACKENDS, NAME, TritonPtx)
        yield driver
