"""All Triton kernels by name. Importing this module imports Triton."""

from __future__ import annotations

from typing import Any

from .adam import adam
from .lion import lion
from .norm import finish_norm, norm
from .perturb import perturb, restore
from .sgd import sgd
from .vectors import axpby, dot

KERNELS: dict[str, Any] = {
    "norm": norm,
    "finish_norm": finish_norm,
    "perturb": perturb,
    "sgd": sgd,
    "adam": adam,
    "lion": lion,
    "restore": restore,
    "dot": dot,
    "axpby": axpby,
}
