"""The primitives on gradients and kept vectors as Triton kernels, P4 to P6: dots, combine, average.

They read the table of blocks.py, of whose rows only sizes and first blocks count, and three columns of
addresses, xs, ys and outs: int64 (rows). Arithmetic is fp32; sums have the type of `sums`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends import contract

from .blocks import EVEN, ODD, POINTERS, WHOLE, find, inside, is_last, is_set, lanes, path_of, sum_slots

XY = tl.constexpr(contract.XY)
XX = tl.constexpr(contract.XX)
YY = tl.constexpr(contract.YY)
SKIP = tl.constexpr(contract.SKIP)


@triton.jit
def _products(
    x, y, begin, count, S: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr
):  # fmt: skip
    here = inside(count, True, BLOCK, PATH)
    a = tl.load(lanes(x, begin, X, BLOCK, PATH), here, 0).to(S)
    b = tl.load(lanes(y, begin, Y, BLOCK, PATH), here, 0).to(S)
    return a * b, a * a, b * b


@triton.jit(do_not_specialize=["blocks", "fresh"], do_not_specialize_on_alignment=POINTERS)
def dots(
    owner, rows, xs, ys, slots, counter, sums, blocks, fresh,
    X: tl.constexpr, Y: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """P4: <x, y>, ||x||^2 and ||y||^2 over all rows, reading both once, as GSAM needs them (arXiv 2203.08065).

    Added up in a fixed order, like the norm.
    """
    S: tl.constexpr = sums.dtype.element_ty
    block = tl.program_id(0)
    xy = tl.zeros([BLOCK], S)
    xx = tl.zeros([BLOCK], S)
    yy = tl.zeros([BLOCK], S)
    while block < blocks:
        row, _, begin, count = find(owner, rows, block, BLOCK)
        x = tl.load(xs + row)
        y = tl.load(ys + row)
        path = path_of(x | y, count, BLOCK)
        if path == WHOLE:
            p, q, r = _products(x, y, begin, count, S, X, Y, BLOCK, WHOLE)
        elif path == EVEN:
            p, q, r = _products(x, y, begin, count, S, X, Y, BLOCK, EVEN)
        else:
            p, q, r = _products(x, y, begin, count, S, X, Y, BLOCK, ODD)
        xy += p
        xx += q
        yy += r
        block += tl.num_programs(0)
    slot = slots + tl.program_id(0)
    tl.store(slot, tl.sum(xy))
    tl.store(slot + SLOTS, tl.sum(xx))
    tl.store(slot + 2 * SLOTS, tl.sum(yy))
    if is_last(counter):
        tl.store(sums + XY, tl.where(fresh != 0, 0.0, tl.load(sums + XY)) + sum_slots(slots, SLOTS))
        tl.store(sums + XX, tl.where(fresh != 0, 0.0, tl.load(sums + XX)) + sum_slots(slots + SLOTS, SLOTS))
        tl.store(sums + YY, tl.where(fresh != 0, 0.0, tl.load(sums + YY)) + sum_slots(slots + 2 * SLOTS, SLOTS))


@triton.jit
def _combine_block(
    x, y, out, begin, count, a, b, wanted,
    X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    # A column with coefficient 0 is not read, and counts as 0.
    u = tl.load(lanes(x, begin, X, BLOCK, PATH), inside(count, wanted & is_set(a), BLOCK, PATH), 0).to(tl.float32)
    v = tl.load(lanes(y, begin, Y, BLOCK, PATH), inside(count, wanted & is_set(b), BLOCK, PATH), 0).to(tl.float32)
    tl.store(lanes(out, begin, OUT, BLOCK, PATH), (a * u + b * v).to(OUT), inside(count, wanted, BLOCK, PATH))


@triton.jit
def _combine(
    owner, rows, xs, ys, outs, a, b, status,
    X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wanted = True
    if GUARDED:
        wanted = tl.where(tl.load(status + SKIP) != 0, False, True)
    row, _, begin, count = find(owner, rows, tl.program_id(0), BLOCK)
    x = tl.load(xs + row)
    y = tl.load(ys + row)
    out = tl.load(outs + row)
    path = path_of(x | y | out, count, BLOCK)
    if path == WHOLE:
        _combine_block(x, y, out, begin, count, a, b, wanted, X, Y, OUT, BLOCK, WHOLE)
    elif path == EVEN:
        _combine_block(x, y, out, begin, count, a, b, wanted, X, Y, OUT, BLOCK, EVEN)
    else:
        _combine_block(x, y, out, begin, count, a, b, wanted, X, Y, OUT, BLOCK, ODD)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def combine(
    owner, rows, xs, ys, outs, coefficients, status,
    X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P5: out = a x + b y, a and b on the device, as GSAM's and LookSAM's decompositions end (arXiv 2203.08065).

    Guarded, this and `average` write nothing where SKIP is set.
    """
    a = tl.load(coefficients).to(tl.float32)
    b = tl.load(coefficients + 1).to(tl.float32)
    _combine(owner, rows, xs, ys, outs, a, b, status, X, Y, OUT, GUARDED, BLOCK)


@triton.jit(do_not_specialize=["decay", "rest"], do_not_specialize_on_alignment=POINTERS)
def average(
    owner, rows, xs, ys, decay, rest, status,
    X: tl.constexpr, Y: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P6: x = decay x + rest y with rest = 1 - decay, F-SAM's moving average of gradients (arXiv 2403.12350)."""
    _combine(owner, rows, xs, ys, xs, decay, rest, status, X, Y, X, GUARDED, BLOCK)
