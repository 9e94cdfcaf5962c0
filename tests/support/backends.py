"""The backends under test, which are all that this machine can run on CPU tensors.

The C++ backend runs in each instruction set. The CUDA kernels' source runs if it can be compiled for the host, and
Triton if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

import fused_sam

from . import cuda_source


@dataclass(frozen=True)
class Variant:
    """A backend's name and, for "cpu", the instruction set of its kernels."""

    name: str
    instructions: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.instructions}" if self.instructions else self.name

    def active(self) -> AbstractContextManager[None]:
        """Return a context in which the backend uses the instruction set."""
        return _instructions(self.instructions) if self.instructions else nullcontext()


@contextmanager
def _instructions(name: str) -> Iterator[None]:
    from fused_sam import _cpu

    before = _cpu.instruction_set()
    _cpu.use_instruction_set(name)
    try:
        yield
    finally:
        _cpu.use_instruction_set(before)


def _runs(name: str) -> bool:
    try:
        fused_sam.backends.choose(name, torch.device("cpu"))
    except (RuntimeError, ValueError):
        return False
    return True


def _variants() -> list[Variant]:
    usable = [Variant(name) for name in NAMES]
    if Variant("cpu") in usable:
        from fused_sam import _cpu

        usable += [Variant("cpu", name) for name in _cpu.instruction_sets()[1:]]
    if cuda_source.register() is None:
        usable.append(Variant(cuda_source.NAME))
    return usable


NAMES = [name for name in fused_sam.backends.BACKENDS if _runs(name)]
VARIANTS = _variants()

# These backends sum in fp32, as on an accelerator. In fp32, the square of 1e20 is inf.
SUMS_IN_FP32 = ("cuda-source", "triton")
