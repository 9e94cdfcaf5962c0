"""What all Triton kernels share: how a program finds its block of a table, and how it accesses the elements.

A block is BLOCK adjacent elements of one tensor. The blocks of all tensors have one numbering. A table is

    block_row  int32 (blocks)     the row of each block
    rows       int64 (rows, 16)   addresses and sizes, at the places in layout.py

The compiler forms 16-byte accesses only if it can prove them aligned. A block therefore takes one of three paths:

    WHOLE  the tensor fills the block, and all addresses are multiples of 16
    EVEN   a tail of a multiple of 16 elements, as well aligned, under a mask
    ODD    all others: one element at a time, under a mask
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout

SIZE = tl.constexpr(layout.SIZE)
FIRST_BLOCK = tl.constexpr(layout.FIRST_BLOCK)
ROW = tl.constexpr(layout.ROW)

ODD = tl.constexpr(0)
EVEN = tl.constexpr(1)
WHOLE = tl.constexpr(2)

# A kernel is compiled once for all calls, and so must not depend on the alignment of these arguments.
POINTERS = [
    *("block_row_ptr", "rows_ptr", "grads_ptr", "groups_ptr", "lrs_ptr", "status_ptr", "grad_scale_ptr"),
    *("slots_ptr", "ticket_ptr", "x_ptr", "y_ptr", "out_ptr", "sums_ptr", "coefficients_ptr"),
    *("factors_ptr", "unbias_ptr", "partial_ptr"),
]  # fmt: skip


class Block(NamedTuple):
    """A block of a table."""

    row: Any  # number of its row
    row_ptr: Any  # the row's numbers
    begin: Any  # first element
    count: Any  # elements: BLOCK, or fewer at the tensor's end


@triton.jit
def find_block(block_row_ptr, rows_ptr, number, BLOCK: tl.constexpr):
    """Return block `number` of a table."""
    row = tl.load(block_row_ptr + number)
    row_ptr = rows_ptr + row * ROW
    begin = (number - tl.load(row_ptr + FIRST_BLOCK)) * BLOCK
    return Block(row, row_ptr, begin, tl.minimum(tl.load(row_ptr + SIZE) - begin, BLOCK).to(tl.int32))


@triton.jit
def number_from_the_end():
    """Return this program's block, counted from the end: the L2 cache still holds the end of what the norm has read."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def load_pointer(address_ptr, T: tl.constexpr):
    """Load an address as a pointer to elements of type T."""
    return tl.load(address_ptr).to(tl.pointer_type(T))


@triton.jit
def address(ptr):
    """Return a pointer as an integer."""
    return ptr.to(tl.int64)


@triton.jit
def is_set(x):
    """Return True if a scalar is not 0, as a bool: in Triton's interpreter a comparison has the operands' type."""
    return tl.where(x != 0, True, False)


@triton.jit
def path_of(addresses, block, BLOCK: tl.constexpr):
    """Return the path of a block.

    Args:
        addresses: of all its tensors, joined by a bitwise or.
    """
    even = ((addresses & 15) == 0) & ((block.count & 15) == 0)
    return tl.where(even, tl.where(block.count == BLOCK, WHOLE, EVEN), ODD)


@triton.jit
def elements(tensor_ptr, block, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Return pointers to a block's elements of a tensor."""
    first = tensor_ptr + block.begin
    if PATH != ODD:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, BLOCK)


@triton.jit
def mask_if(wanted, block, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Return the mask of a block's elements if the scalar `wanted` is True, else an empty mask."""
    if PATH == WHOLE:
        mask = tl.full([BLOCK], True, tl.int1)
    elif PATH == EVEN:
        mask = tl.arange(0, BLOCK) < block.count // 16 * 16  # the count itself, now a multiple for the compiler
    else:
        mask = tl.arange(0, BLOCK) < block.count
    return mask & wanted


@triton.jit
def is_last(ticket_ptr):
    """Return True in the last program of a launch that calls this; what the others wrote before is visible to it."""
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def sum_slots(slots_ptr, SLOTS: tl.constexpr):
    """Return the sum of one number per program, in an order that depends on their count alone."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.load(slots_ptr + slot, slot < tl.num_programs(0), 0, cache_modifier=".cg"))


@triton.jit
def preconditioner(v, unbias, eps):
    """Return T_w^2 of Precond-SAM (arXiv 2502.02407) from Adam's second moment v."""
    return tl.div_rn(1.0, tl.sqrt_rn(v) * unbias + eps)
