"""The primitives over two vectors as Triton kernels: dot and axpby; ema is an axpby.

They read sizes and first blocks from the table of blocks.py, and the tensors' addresses from columns of their own: x, y
and out, int64 (rows). X, Y and OUT are the dtypes of the columns. Arithmetic is fp32; sums have the type of `sums`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends import contract

from .blocks import (
    EVEN,
    ODD,
    POINTERS,
    WHOLE,
    address,
    elements,
    find_block,
    is_last,
    is_set,
    load_pointer,
    mask_if,
    path_of,
    sum_slots,
)  # fmt: skip

XY = tl.constexpr(contract.XY)
XX = tl.constexpr(contract.XX)
YY = tl.constexpr(contract.YY)
SKIP = tl.constexpr(contract.SKIP)


@triton.jit
def _products(block, a_ptr, b_ptr, S: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr):
    here = mask_if(True, block, BLOCK, PATH)
    a = tl.load(elements(a_ptr, block, BLOCK, PATH), here, 0).to(S)
    b = tl.load(elements(b_ptr, block, BLOCK, PATH), here, 0).to(S)
    return a * b, a * a, b * b


@triton.jit(do_not_specialize=["blocks", "reset"], do_not_specialize_on_alignment=POINTERS)
def dot(
    block_row_ptr, rows_ptr, x_ptr, y_ptr, slots_ptr, ticket_ptr, sums_ptr, blocks, reset,
    X: tl.constexpr, Y: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add <x, y>, ||x||^2 and ||y||^2 over all rows to the sums, reading both once (as GSAM needs, arXiv 2203.08065).

    Sums are added in a fixed order, as in norm.py.

    Args:
        slots_ptr: three times SLOTS numbers of the type of the sums.
        ticket_ptr: an int32 that is 0 between launches.
        reset: not 0 if the sums start from zero.
    """
    S: tl.constexpr = sums_ptr.dtype.element_ty
    number = tl.program_id(0)
    xy = tl.zeros([BLOCK], S)
    xx = tl.zeros([BLOCK], S)
    yy = tl.zeros([BLOCK], S)
    while number < blocks:
        block = find_block(block_row_ptr, rows_ptr, number, BLOCK)
        a_ptr = load_pointer(x_ptr + block.row, X)
        b_ptr = load_pointer(y_ptr + block.row, Y)
        path = path_of(address(a_ptr) | address(b_ptr), block, BLOCK)
        if path == WHOLE:
            p, q, r = _products(block, a_ptr, b_ptr, S, BLOCK, WHOLE)
        elif path == EVEN:
            p, q, r = _products(block, a_ptr, b_ptr, S, BLOCK, EVEN)
        else:
            p, q, r = _products(block, a_ptr, b_ptr, S, BLOCK, ODD)
        xy += p
        xx += q
        yy += r
        number += tl.num_programs(0)
    slot_ptr = slots_ptr + tl.program_id(0)
    tl.store(slot_ptr, tl.sum(xy))
    tl.store(slot_ptr + SLOTS, tl.sum(xx))
    tl.store(slot_ptr + 2 * SLOTS, tl.sum(yy))
    if is_last(ticket_ptr):
        _add_to(sums_ptr + XY, slots_ptr, reset, SLOTS)
        _add_to(sums_ptr + XX, slots_ptr + SLOTS, reset, SLOTS)
        _add_to(sums_ptr + YY, slots_ptr + 2 * SLOTS, reset, SLOTS)


@triton.jit
def _add_to(sum_ptr, slots_ptr, reset, SLOTS: tl.constexpr):
    tl.store(sum_ptr, tl.where(reset != 0, 0.0, tl.load(sum_ptr)) + sum_slots(slots_ptr, SLOTS))


@triton.jit
def _axpby_block(block, a, u_ptr, b, v_ptr, to_ptr, write, BLOCK: tl.constexpr, PATH: tl.constexpr):
    # A column with coefficient 0 is not read, and counts as 0.
    u = tl.load(elements(u_ptr, block, BLOCK, PATH), mask_if(write & is_set(a), block, BLOCK, PATH), 0).to(tl.float32)
    v = tl.load(elements(v_ptr, block, BLOCK, PATH), mask_if(write & is_set(b), block, BLOCK, PATH), 0).to(tl.float32)
    to = elements(to_ptr, block, BLOCK, PATH)
    tl.store(to, (a * u + b * v).to(to_ptr.dtype.element_ty), mask_if(write, block, BLOCK, PATH))


@triton.jit(do_not_specialize=["a", "b"], do_not_specialize_on_alignment=POINTERS)
def axpby(
    block_row_ptr, rows_ptr, x_ptr, y_ptr, out_ptr, coefficients_ptr, a, b, status_ptr,
    X: tl.constexpr, Y: tl.constexpr, OUT: tl.constexpr, HOST: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out = a * x + b * y, as the decompositions of GSAM and LookSAM end (arXiv 2203.08065).

    With a = decay, b = 1 - decay and out = x, this is F-SAM's moving average of gradients (arXiv 2403.12350).

    Args:
        coefficients_ptr: a and b on the device; with HOST they are the arguments.
        status_ptr: with GUARDED nothing is written where skip is set.
    """
    if not HOST:
        a = tl.load(coefficients_ptr).to(tl.float32)
        b = tl.load(coefficients_ptr + 1).to(tl.float32)
    write = True
    if GUARDED:
        write = tl.where(tl.load(status_ptr + SKIP) != 0, False, True)
    block = find_block(block_row_ptr, rows_ptr, tl.program_id(0), BLOCK)
    u_ptr = load_pointer(x_ptr + block.row, X)
    v_ptr = load_pointer(y_ptr + block.row, Y)
    to_ptr = load_pointer(out_ptr + block.row, OUT)
    path = path_of(address(u_ptr) | address(v_ptr) | address(to_ptr), block, BLOCK)
    if path == WHOLE:
        _axpby_block(block, a, u_ptr, b, v_ptr, to_ptr, write, BLOCK, WHOLE)
    elif path == EVEN:
        _axpby_block(block, a, u_ptr, b, v_ptr, to_ptr, write, BLOCK, EVEN)
    else:
        _axpby_block(block, a, u_ptr, b, v_ptr, to_ptr, write, BLOCK, ODD)
