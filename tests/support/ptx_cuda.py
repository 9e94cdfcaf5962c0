"""The CUDA backend with PTX in place of a GPU: table.cu and the bindings run on the host, the launches in support.ptx.

nvcc compiles csrc/cuda to PTX, which takes some seconds of one core and is kept under build/ until the sources change.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fused_sam import backends
from fused_sam.backends.contract import PerturbGroup, Status, Table, VectorPair
from fused_sam.backends.cuda import Cuda

from . import cuda_source
from .cuda_source import ROOT, CudaSource, UnbuildableError
from .ptx import Kernel, Options, PtxError, Region, kernels_of, launch
from .ptx_regions import regions_of, table_regions

NAME = "cuda-ptx"
FILES = ("norm", "vectors", "perturb", "element", "sgd", "adam")  # of csrc/cuda; table.cu and device.cu have no kernels
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ptx", "-arch=sm_90")
OLDEST = (12, 1)  # of nvcc: it passes large tables


# ---- PTX ------------------------------------------------------------------------------------------------------------


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        raise UnbuildableError("nvcc is missing (NVIDIA's CUDA toolkit)")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        number = version[0].removeprefix("release ") if version else "of an unknown version"
        raise UnbuildableError(f"nvcc {number} is too old: it must be {OLDEST[0]}.{OLDEST[1]} or newer")
    return found


def compiled(sources: Path = ROOT / "csrc") -> list[Path]:
    """Compile a PTX file for each file of kernels, unless it exists."""
    nvcc = _nvcc()
    state = hashlib.sha256(repr((nvcc, FLAGS)).encode())
    for folder in ("core", "cuda"):
        for file in sorted((sources / folder).iterdir()):
            state.update(file.read_bytes())
    folder = ROOT / "build" / "ptx" / state.hexdigest()[:16]
    if not folder.exists() and sources == ROOT / "csrc":
        shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_file(name: str) -> Path:
        target = folder / f"{name}.ptx"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            cuda_source.run([nvcc, *FLAGS, f"-I{sources}", str(sources / "cuda" / f"{name}.cu"), "-o", str(unfinished)])
            unfinished.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_file, FILES))


def _plain(demangled: str) -> str:
    """Return a function's name with its template's arguments, without its parameters."""
    text = demangled.removeprefix("void ").replace("(anonymous namespace)", "unnamed")
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:k]
    return text


def _demangled(names: Sequence[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_plain(line) for line in done.stdout.splitlines()]


@cache
def kernels() -> dict[str, Kernel]:
    """Return all kernels by their names in the source."""
    found: dict[str, Kernel] = {}
    for file in compiled():
        found |= kernels_of(file.read_text())
    return dict(zip(_demangled(list(found)), found.values(), strict=True))


@cache
def _names_by_place() -> dict[int, str]:
    """Return the kernels of the module over the shim, by the places of their symbols."""
    said = subprocess.run(["nm", str(cuda_source.build())], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in said.splitlines() if re.search(r" [tT] _Z\w*_kernel", line)]
    names = _demangled([name for _, _, name in symbols])
    return {int(place, 16): name for (place, _, _), name in zip(symbols, names, strict=True)}


def packed(kernel: Kernel, arguments: Sequence[bytes]) -> bytes:
    """Return arguments as the kernel's parameters lie in memory."""
    if [len(a) for a in arguments] != [p.size for p in kernel.parameters]:
        raise PtxError(
            f"{kernel.name} has parameters of {[p.size for p in kernel.parameters]} bytes, "
            f"and the host passes {[len(a) for a in arguments]}"
        )
    room = bytearray(kernel.parameter_bytes)
    for argument, parameter in zip(arguments, kernel.parameters, strict=True):
        room[parameter.offset : parameter.offset + parameter.size] = argument
    return bytes(room)


# ---- the backend ----------------------------------------------------------------------------------------------------


class _Launching(Cuda):
    """Runs launches in the interpreter, with the memory of the call's tensors and no other."""

    options: ClassVar[Options] = Options()
    changed: ClassVar[dict[str, Kernel]] = {}  # kernels by name that run in place of the compiled ones
    launched: ClassVar[list[str]] = []  # names of the kernels that have run

    @contextmanager
    def _with(self, regions: list[Region], **named: Any) -> Iterator[None]:
        regions = [*regions, *(r for name, x in named.items() for r in regions_of(name, [x]))]

        def run(place: int, blocks: int, threads: int, arguments: list[bytes]) -> None:
            name = _names_by_place()[place]
            kernel = self.changed.get(name) or kernels()[name]
            self.launched.append(name)
            launch(kernel, blocks, threads, packed(kernel, arguments), regions, options=self.options)

        assert self.module is not None
        self.module.on_launch(run)
        try:
            yield
        finally:
            self.module.on_launch(None)

    def _regions(self, table: Table) -> list[Region]:
        return [*table_regions(table), *regions_of("workspace", [self._table(table)[1]])]

    def _norm(self, table: Table, groups: Any, status: Status, *how: Any) -> None:
        with self._with(self._regions(table), status=status.values):
            super()._norm(table, groups, status, *how)

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        with self._with([], status=status.values):
            super().finish_norm(status, ascent=ascent, keep_skip=keep_skip, eps=eps)

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        with self._with(self._regions(table), sums=sums):
            super().squares(table, groups, sums, weights=weights)

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        with self._with(self._regions(table), status=status.values):
            super().perturb(table, groups, status)

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        regions = [*self._regions(table), *regions_of("lr", [g.lr for g in groups])]
        with self._with(regions, status=status.values, grad_scale=grad_scale):
            super().update(table, groups, status, grad_scale, max_norm)

    def restore(self, table: Table) -> None:
        with self._with(self._regions(table)):
            super().restore(table)

    def _pair_regions(self, pair: VectorPair) -> list[Region]:
        found = self._pair(pair)
        workspace = regions_of("workspace", [] if found is None else [found[1]])
        return [*regions_of("x", pair.x), *regions_of("y", pair.y), *workspace]

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        with self._with(self._pair_regions(pair), sums=sums):
            super().dot(pair, sums, reset=reset)

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        regions = [*self._pair_regions(pair), *regions_of("out", out)]
        with self._with(regions, coefficients=coefficients, status=None if status is None else status.values):
            super().axpby(pair, out, coefficients, status)


class CudaPtx(CudaSource, _Launching):
    """The kernels' PTX on CPU tensors."""

    name = NAME


def register() -> str | None:
    """Register the backend as "cuda-ptx". Return the reason why it cannot run here, or None."""
    reason = cuda_source.register()
    if reason is not None:
        return reason
    try:
        _nvcc()
    except UnbuildableError as error:
        return str(error)
    CudaPtx.module = cuda_source.module()
    backends.BACKENDS[NAME] = CudaPtx
    return None
