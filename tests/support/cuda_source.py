"""A backend for CPU tensors of the CUDA kernels' source, compiled by g++ with csrc/tests/cuda_shim.

The whole Python suite can run with the kernels on a machine without a GPU. The backend is only for tests. It is slow,
and its times do not predict those of a GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from fused_sam import backends
from fused_sam.backends.contract import LOW_PRECISION, VectorPair
from fused_sam.backends.cuda import Cuda

from .fp32_numbers import Fp32Numbers

NAME = "cuda-source"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("on_host.cpp", "fibers.cpp", "module.cpp")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-unknown-pragmas")


class UnbuildableError(Exception):
    """Raised if this machine lacks something that the build needs."""


class CudaSource(Fp32Numbers, Cuda):
    """The kernels on CPU tensors."""

    name = NAME

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        known = dtype in (torch.float32, *LOW_PRECISION)
        wider = dtype in LOW_PRECISION and grad_dtype is torch.float32
        return device.type == "cpu" and known and (grad_dtype is dtype or wider)

    def _stream(self, device: torch.device) -> int:
        return 0

    def has_kernels(self, pair: VectorPair) -> bool:
        return self._pair(pair) is not None


def register() -> str | None:
    """Register the backend as "cuda-source". Return the reason why it cannot be built here, or None."""
    try:
        CudaSource.module = module()
    except UnbuildableError as error:
        return str(error)
    backends.BACKENDS[NAME] = CudaSource
    return None


@cache
def module() -> ModuleType:
    """Return fused_sam's CUDA bindings over the shim, built once per state of the sources."""
    path = build()
    spec = importlib.util.spec_from_file_location("_cuda_shim", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build() -> Path:
    """Compile the module unless it exists. Return its path."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnbuildableError("there is no C++ compiler (apt install g++)")
    try:
        import pybind11
    except ImportError as error:
        raise UnbuildableError("pybind11 is missing (pip install pybind11)") from error
    csrc = ROOT / "csrc"
    state = hashlib.sha256(repr((compiler, FLAGS, pybind11.__version__)).encode())
    for sources in ("core", "cuda", "bindings", "tests/cuda_shim"):
        for file in sorted((csrc / sources).iterdir()):
            state.update(file.read_bytes())
    folder = ROOT / "build" / "cuda-source"
    target = folder / f"_cuda_shim-{state.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("_cuda_shim-*"):
        old.unlink(missing_ok=True)
    shim = csrc / "tests/cuda_shim"
    places = (csrc, shim, pybind11.get_include(), sysconfig.get_path("include"))
    common = [*compiler.split(), *FLAGS, *(f"-I{place}" for place in places)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [f"{scratch}/{Path(source).stem}.o" for source in SOURCES]
        commands = [
            [*common, "-c", str(shim / source), "-o", output]
            for source, output in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, commands))
        run([*compiler.split(), "-shared", *objects, "-o", f"{scratch}/module"])
        os.replace(f"{scratch}/module", target)  # atomic if several processes build at the same time
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
