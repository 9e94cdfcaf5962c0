"""A pytest plugin for processes that interpret Triton kernels: fp32 rounds to the nearest bf16, as on GPUs.

Triton 3.9's interpreter cuts the lower bits off. With this plugin, tests check bf16 as strictly as fp16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _to_bf16(x: Any) -> Any:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # ties to even
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _cast_rounding(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return TensorHandle(_to_bf16(source.data), to.scalar)
    if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), to.scalar)
    return _cast(self, source, to)


InterpreterBuilder.cast_impl = _cast_rounding
