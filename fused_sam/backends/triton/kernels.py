"""All Triton kernels by name. Importing this module imports Triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fused_sam.backends.contract import RULES

from .norm import finish_norm, norm, row_sums, squares
from .perturb import perturb, restore
from .vectors import axpby, dot

KERNELS: dict[str, Any] = {
    "norm": norm,
    "finish_norm": finish_norm,
    "squares": squares,
    "row_sums": row_sums,
    "perturb": perturb,
    "restore": restore,
    "dot": dot,
    "axpby": axpby,
}
# An update rule has its kernel in a module of its name.
KERNELS |= {rule.name: getattr(import_module(f"{__package__}.{rule.name}"), rule.name) for rule in RULES}

# Those whose programs each take many blocks. Their grid follows from the compiled kernel.
REDUCTIONS = ("norm", "dot")
