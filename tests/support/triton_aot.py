"""Triton kernels compiled ahead of time for GPUs that this machine does not have, and numbers of their machine code."""

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

from fused_sam.backends.contract import ADAM, RULES
from fused_sam.backends.triton.kernels import KERNELS as FUNCTIONS

BLOCK = 2048
THREADS = 256

TYPES = {
    **dict.fromkeys(("rows_ptr", "grads_ptr", "lrs_ptr", "x_ptr", "y_ptr", "out_ptr"), "*i64"),
    **dict.fromkeys(("block_row_ptr", "ticket_ptr"), "*i32"),
    **dict.fromkeys(
        (
            *("groups_ptr", "status_ptr", "grad_scale_ptr", "slots_ptr", "sums_ptr", "coefficients_ptr"),
            *("factors_ptr", "unbias_ptr", "partial_ptr"),
        ),
        "*fp32",
    ),
    **dict.fromkeys(("blocks", "flags", "reset", "rows"), "i32"),
    **dict.fromkeys(("eps", "max_norm", "a", "b"), "fp32"),
}

# The constants that choose a variant of a kernel, where a case does not name them.
PLAIN = dict.fromkeys(
    (
        *("MASTERS", "ROUND", "MASKED", "FACTORS", "PRECONDITIONED", "WEIGHTS"),
        *("WITH_AMSGRAD", "HOST", "GUARDED"),
    ),
    False,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the columns that it reads and writes.

    p is a column of params, g of gradients (or x, y, out of vectors), f of fp32 numbers.
    """

    name: str
    reads: str
    writes: str = ""
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def reads_always(self) -> bool:
        """True if a column is read for all numbers that the device may hold."""
        return self.name != "axpby" and not (self.name == "perturb" and self.constant("MASTERS"))

    def constant(self, name: str) -> Any:
        return {**PLAIN, **dict(self.constants)}.get(name)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.constants)])


# The rules that use all their state in every group, with an fp32 column for each buffer.
PLAIN_RULES = {rule.name: "f" * len(rule.buffers()) for rule in RULES if rule is not ADAM}

KERNELS = [
    Kernel("norm", "pg", constants=(("ASCENT", True),)),
    Kernel("norm", "g", constants=(("ASCENT", False),)),
    Kernel("perturb", "pg", "pp"),
    Kernel("perturb", "pg", "pp", (("MASKED", True),)),
    Kernel("perturb", "pg", "pp", (("FACTORS", True),)),
    Kernel("perturb", "pgf", "pp", (("PRECONDITIONED", True),)),
    Kernel("squares", "pg", constants=(("WEIGHTS", True),)),
    Kernel("squares", "gf", constants=(("PRECONDITIONED", True),)),
    *(Kernel(name, "pg" + state, "p" + state) for name, state in PLAIN_RULES.items()),
    Kernel("adam", "pgff", "pff"),
    Kernel("adam", "pgfff", "pfff", (("WITH_AMSGRAD", True),)),
    Kernel("restore", "p", "p"),
    Kernel("dot", "pg"),
    Kernel("axpby", "pg", "p"),
    Kernel("axpby", "pg", "p", (("HOST", True),)),
    Kernel("axpby", "pg", "p", (("HOST", True), ("GUARDED", True))),
]
MASTERS = [
    Kernel(name, reads, writes, (("MASTERS", True),))
    for name, reads, writes in (
        ("norm", "fg", ""), ("perturb", "fg", "p"), ("adam", "fgff", "fffp"), ("restore", "f", "p"),
        *((name, "fg" + state, "f" + state + "p") for name, state in PLAIN_RULES.items()),
    )
]  # fmt: skip
ROUNDING = [
    Kernel("perturb", "pg", "pp", (("ROUND", True),)),
    Kernel("perturb", "pg", "pp", (("ROUND", True), ("MASKED", True))),
    *(Kernel(name, "pg" + state, "p" + state, (("ROUND", True),)) for name, state in PLAIN_RULES.items()),
    Kernel("adam", "pgff", "pff", (("ROUND", True),)),
]


def compiled(kernel: Kernel, param: tl.dtype, grad: tl.dtype, target: GPUTarget) -> Any:
    """Compile a kernel for params, x and out of dtype `param`, and gradients and y of dtype `grad`."""
    function = FUNCTIONS[kernel.name]
    dtypes = {"P": param, "X": param, "OUT": param, "G": grad, "Y": grad}
    every = {**PLAIN, "ASCENT": True, **dtypes, "BLOCK": BLOCK, "SLOTS": 2048, **dict(kernel.constants)}
    constants = {k: v for k, v in every.items() if k in function.arg_names}
    signature = {n: "constexpr" if n in constants else TYPES[n] for n in function.arg_names}
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": True}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


def wide_accesses(ptx: str) -> dict[str, int]:
    """Return how many 16-byte loads and stores of global memory there are."""
    return {kind: len(re.findall(rf"\b{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st")}


def unmasked_loads(ptx: str) -> int:
    """Return how many of the 16-byte loads have no predicate."""
    return len(re.findall(r"^\s*ld\.global\S*\.v4\.b32", ptx, re.MULTILINE))


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Return the registers, and the bytes of stack and local memory, of the only kernel in a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
