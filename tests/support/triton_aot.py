"""Triton kernels compiled ahead of time, for GPUs that are not there, and what their code shows."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_sam.backends.triton import passes, updates, vectors

BLOCK = 2048
THREADS = 256

TYPES = {
    **dict.fromkeys(("rows", "gradients", "rates", "xs", "ys", "outs"), "*i64"),
    **dict.fromkeys(("owner", "counter"), "*i32"),
    **dict.fromkeys(("hyper", "status", "scale", "slots", "sums", "coefficients"), "*fp32"),
    **dict.fromkeys(("blocks", "flags", "fresh", "tensors"), "i32"),
    **dict.fromkeys(("eps", "decay", "rest"), "fp32"),
}


# What decides on a variant of a kernel, where a case does not name it.
PLAIN = {"M": None, "ROUND": False, "CHOOSE": False, "LARGE": False, "GUARDED": False}


@dataclass(frozen=True)
class Kernel:
    """A kernel and the columns that it reads and writes.

    w and g (or x, y, out) are in the case's dtypes, m in fp32, and 2 in 16 bits.
    """

    name: str
    reads: str
    writes: str = ""
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def reads_always(self) -> bool:
        """Whether some column is read whatever the numbers on the device say."""
        return self.name not in ("combine", "average") and not (self.name == "perturb" and self.constant("M"))

    def constant(self, name: str) -> Any:
        return {**PLAIN, **dict(self.constants)}.get(name)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.constants)])


KERNELS = [
    Kernel("norm", "wg", constants=(("SCALED", True),)),
    Kernel("norm", "g", constants=(("SCALED", False),)),
    Kernel("perturb", "wg", "ww"),
    Kernel("perturb", "wg", "ww", (("CHOOSE", True),)),
    Kernel("sgd", "wgm", "wm"),
    Kernel("adam", "wgmm", "wmm"),
    Kernel("adam", "wgmmm", "wmmm", (("LARGE", True),)),
    Kernel("restore", "w", "w"),
    Kernel("dots", "wg"),
    Kernel("combine", "wg", "w"),
    Kernel("average", "wg", "w"),
    Kernel("average", "wg", "w", (("GUARDED", True),)),
]
MASTERS = [
    Kernel(name, reads, writes, (("M", model),))
    for model in (tl.bfloat16, tl.float16)
    for name, reads, writes in (
        ("perturb", "wg", "2"), ("sgd", "wgm", "wm2"), ("adam", "wgmm", "wmm2"), ("restore", "w", "2"),
    )
]  # fmt: skip
ROUNDING = [
    Kernel("perturb", "wg", "ww", (("ROUND", True),)),
    Kernel("perturb", "wg", "ww", (("ROUND", True), ("CHOOSE", True))),
    Kernel("sgd", "wgm", "wm", (("ROUND", True),)),
    Kernel("adam", "wgmm", "wmm", (("ROUND", True),)),
]


def compiled(kernel: Kernel, weight: tl.dtype, gradient: tl.dtype, target: GPUTarget) -> Any:
    """The kernel for columns w, x and out of `weight` and g, y of `gradient`."""
    modules = (passes, updates, vectors)
    function = next(getattr(m, kernel.name) for m in modules if hasattr(m, kernel.name))
    constants = {"W": weight, "X": weight, "OUT": weight, "G": gradient, "Y": gradient, "BLOCK": BLOCK, "SLOTS": 2048}
    every = {**PLAIN, **constants, **dict(kernel.constants)}
    constants = {k: v for k, v in every.items() if k in function.arg_names}
    signature = {n: "constexpr" if n in constants else TYPES[n] for n in function.arg_names}
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": True}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


def wide_accesses(ptx: str) -> dict[str, int]:
    """How many 16-byte loads and stores of global memory there are."""
    return {kind: len(re.findall(rf"\b{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st")}


def unmasked_loads(ptx: str) -> int:
    """How many of the 16-byte loads stand without a predicate."""
    return len(re.findall(r"^\s*ld\.global\S*\.v4\.b32", ptx, re.MULTILINE))


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of the only kernel in a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
