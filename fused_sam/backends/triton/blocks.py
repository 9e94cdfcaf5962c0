"""What all Triton kernels share: how a program finds its block of a table, and how it reads and writes one.

A block is BLOCK neighbouring elements of one tensor; blocks of all tensors are numbered through. A table is

    owner  int32 (blocks)   the row that owns a block
    rows   int64 (rows, 16) addresses (0: none), elements, first block, parameter group, number of its random stream

Each block takes one of three paths, for the compiler forms 16-byte accesses only where it knows that it may: WHOLE, the
tensor fills the block and all addresses are multiples of 16; EVEN, a tail that is as well aligned and a multiple of
16 elements, under a mask; ODD, anything else, one element at a time under a mask.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from . import layout

WEIGHT = tl.constexpr(layout.WEIGHT)
BACKUP = tl.constexpr(layout.BACKUP)
SIZE = tl.constexpr(layout.SIZE)
FIRST = tl.constexpr(layout.FIRST)
GROUP = tl.constexpr(layout.GROUP)
MODEL = tl.constexpr(layout.MODEL)
ROW = tl.constexpr(layout.ROW)

ODD = tl.constexpr(0)
EVEN = tl.constexpr(1)
WHOLE = tl.constexpr(2)

# A kernel compiled once must fit every call: nothing in it may depend on the alignment of these arguments.
POINTERS = [
    *("owner", "rows", "gradients", "hyper", "rates", "status", "scale", "slots", "counter"),
    *("xs", "ys", "outs", "sums", "coefficients"),
]  # fmt: skip


@triton.jit
def is_set(x):
    """Whether a scalar is not 0: the comparison as a bool, which in Triton's interpreter has the operands' type."""
    return tl.where(x != 0, True, False)


@triton.jit
def find(owner, rows, block, BLOCK: tl.constexpr):
    """A block's row, the row's place, the block's first element and how many elements the tensor has of it."""
    row = tl.load(owner + block)
    entry = rows + row * ROW
    begin = (block - tl.load(entry + FIRST)) * BLOCK
    return row, entry, begin, tl.minimum(tl.load(entry + SIZE) - begin, BLOCK).to(tl.int32)


@triton.jit
def from_the_end():
    """This program's block where the norm ran just before: its end is what the cache still holds."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def path_of(addresses, count, BLOCK: tl.constexpr):
    """The path of a block; `addresses` are joined by a bitwise or."""
    even = ((addresses & 15) == 0) & ((count & 15) == 0)
    return tl.where(even, tl.where(count == BLOCK, WHOLE, EVEN), ODD)


@triton.jit
def lanes(address, begin, T: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Pointers to a block's elements."""
    start = address.to(tl.pointer_type(T)) + begin
    if PATH != ODD:
        start = tl.multiple_of(start, 16)
    return start + tl.arange(0, BLOCK)


@triton.jit
def inside(count, wanted, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Mask of the elements to touch: those that the tensor has, and none unless `wanted`, a scalar."""
    if PATH == WHOLE:
        mask = tl.full([BLOCK], True, tl.int1)
    elif PATH == EVEN:
        mask = tl.arange(0, BLOCK) < count // 16 * 16  # which is count; now the compiler sees a multiple
    else:
        mask = tl.arange(0, BLOCK) < count
    return mask & wanted


@triton.jit
def is_last(counter):
    """Whether this program is the last of its launch to come here; it then sees what the others wrote before."""
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_slots(slots, SLOTS: tl.constexpr):
    """The sum of one number a program, in an order that only their count decides."""
    lane = tl.arange(0, SLOTS)
    return tl.sum(tl.load(slots + lane, lane < tl.num_programs(0), 0, cache_modifier=".cg"))
