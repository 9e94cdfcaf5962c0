"""What the Triton backend needs of a machine."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

_OLDEST = (3, 6)  # launch.py relies on the launcher of Triton 3.6 and newer


def interpreting() -> bool:
    """Return True if Triton's interpreter runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable_reason() -> str | None:
    """Return why the backend cannot run here and what to do about it; None if it can."""
    return _without_triton() or (None if interpreting() else _without_gpu())


def _without_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; torch for Linux with CUDA, ROCm or XPU brings it, else `pip install triton`"
    try:
        import triton
    except Exception as error:  # a broken install may raise anything
        return f"triton does not import ({type(error).__name__}: {error}); reinstall it"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is too old; 3.6 or newer is needed, which torch 2.10 and newer bring"
    return None


def _without_gpu() -> str | None:
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
