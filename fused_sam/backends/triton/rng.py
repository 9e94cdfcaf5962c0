"""Random numbers in Triton kernels, masks and stochastic rounding: what backends/rng.py specifies.

Words are uint32: shifts bring in zeros, and sums and products are modulo 2^32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout

RNG_OFFSET = tl.constexpr(contract.RNG_OFFSET)
SEED = tl.constexpr(layout.SEED)
RNG_STREAM = tl.constexpr(layout.RNG_STREAM)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_words(block, group_ptr, status_ptr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Return one word per element of a block, from the stream of its row and a purpose."""
    seed = tl.load((group_ptr + SEED).to(tl.pointer_type(tl.uint64)))
    stream = tl.load(block.row_ptr + RNG_STREAM).to(tl.uint32)
    draw = tl.load(status_ptr + RNG_OFFSET).to(tl.uint32)
    a = _mix(_mix(seed.to(tl.uint32) + draw * 0x9E3779B9) + stream * 0x85EBCA6B + PURPOSE * 0xC2B2AE35 % 0x100000000)
    b = _mix(_mix((seed >> 32).to(tl.uint32) ^ a) + 0x27D4EB2F)
    # A block begins at a multiple of its size, which is a power of 2: its elements have one upper half.
    upper = (block.begin >> 32).to(tl.uint32)
    lower = block.begin.to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    return _mix(_mix(lower + a) ^ (b + upper * 0x9E3779B9))


@triton.jit
def in_mask(word, mask_prob):
    """Return True with probability `mask_prob`, in steps of 2^-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08 < mask_prob


@triton.jit
def _to_bf16(x, word):
    bits = x.to(tl.uint32, bitcast=True)
    down = ((bits + (word & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, down).to(tl.bfloat16)  # exact: the low bits are 0


@triton.jit
def _to_f16(x, word):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + (word & 0x1FFF)) & 0x7FFFE000).to(tl.float32, bitcast=True)
    # Below 2^-14 numbers are 2^-24 apart.
    steps = tl.abs(x) * 16777216.0 + (word & 0x3FFF).to(tl.float32) * 6.103515625e-05
    rounded = tl.where(magnitude >= 0x38800000, normal, tl.floor(steps) * 5.9604644775390625e-08)
    rounded = tl.where(magnitude < 0x477FE000, rounded, tl.abs(x))  # to nearest
    return tl.where(bits >= 0x80000000, -rounded, rounded).to(tl.float16)


@triton.jit
def rounded_to(T: tl.constexpr, x, block, group_ptr, status_ptr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Round fp32 numbers to T: stochastically, or to nearest where PURPOSE is None."""
    if PURPOSE is None:
        y = x.to(T)
    elif tl.bfloat16 == T:
        y = _to_bf16(x, random_words(block, group_ptr, status_ptr, PURPOSE, BLOCK))
    else:
        y = _to_f16(x, random_words(block, group_ptr, status_ptr, PURPOSE, BLOCK))
    return y
