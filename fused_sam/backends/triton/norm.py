"""The norm as Triton kernels: `norm` in one launch per table, and `finish_norm` for a sum over several processes.

`squares` and `row_sums` are the two launches of the sums of squares per row.

Besides the table of blocks.py, the kernels of this file, perturb.py and update.py read

    grads    int64 (rows)         addresses of the gradients
    groups   fp32 (groups, 32)    hyper-parameters, at the places in layout.py
    status   (9)                  the numbers that primitives leave for each other, at the places in contract.py

P and G are the dtypes of params and gradients. With MASTERS there are fp32 masters of the params, and no backups.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
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
    preconditioner,
    sum_slots,
)  # fmt: skip

PARAM = tl.constexpr(layout.PARAM)
CLEAN = tl.constexpr(layout.CLEAN)
GROUP = tl.constexpr(layout.GROUP)
GROUP_SIZE = tl.constexpr(layout.GROUP_SIZE)
SIZE = tl.constexpr(layout.SIZE)
FIRST_BLOCK = tl.constexpr(layout.FIRST_BLOCK)
ROW = tl.constexpr(layout.ROW)
STATE = tl.constexpr(layout.STATE)
ETA = tl.constexpr(layout.place(layout.PerturbNumbers, "eta"))
ADAPTIVE = tl.constexpr(layout.place(layout.PerturbNumbers, "adaptive"))
RESET = tl.constexpr(layout.RESET)
FINISH = tl.constexpr(layout.FINISH)
KEEP_SKIP = tl.constexpr(layout.KEEP_SKIP)

SUM = tl.constexpr(contract.SUM)
ASCENT_NORM = tl.constexpr(contract.ASCENT_NORM)
INVERSE_NORM = tl.constexpr(contract.INVERSE_NORM)
SKIP = tl.constexpr(contract.SKIP)
UPDATE_NORM = tl.constexpr(contract.UPDATE_NORM)
SKIPPED_STEPS = tl.constexpr(contract.SKIPPED_STEPS)


@triton.jit
def _squares(
    block, grad_ptr, weight_ptr, adaptive, eta, S: tl.constexpr, ASCENT: tl.constexpr, BLOCK: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    """Return (T_w g)^2 of a block's elements in type S."""
    x = tl.load(elements(grad_ptr, block, BLOCK, PATH), mask_if(True, block, BLOCK, PATH), 0).to(S)
    if ASCENT:
        w = tl.load(elements(weight_ptr, block, BLOCK, PATH), mask_if(adaptive, block, BLOCK, PATH), 0).to(S)
        x = x * tl.where(adaptive, tl.abs(w) + eta, 1.0)
    return x * x


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)  # tl.sqrt is an approximation, which returns 0 for subnormal numbers
    return tl.sqrt(x)


@triton.jit
def _finish(status_ptr, total, eps, flags, ASCENT: tl.constexpr):
    length = _sqrt(total)
    skip = tl.where(total < float("inf"), 0, 1)
    if ASCENT:
        inverse = 1.0 / (length + eps)
        tl.store(status_ptr + ASCENT_NORM, length)
        tl.store(status_ptr + INVERSE_NORM, tl.where((inverse <= 1e30), inverse, 0.0))
    else:
        tl.store(status_ptr + UPDATE_NORM, length)
    before = tl.load(status_ptr + SKIP) != 0
    if (flags & KEEP_SKIP) != 0:
        skip = tl.where(before, 1, skip)
    else:  # a step begins, and the flag is the last one's
        in_a_row = tl.load(status_ptr + SKIPPED_STEPS) + 1
        tl.store(status_ptr + SKIPPED_STEPS, tl.where(before, in_a_row, 0.0).to(status_ptr.dtype.element_ty))
    tl.store(status_ptr + SKIP, skip.to(status_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["blocks", "flags", "eps"], do_not_specialize_on_alignment=POINTERS)
def norm(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, slots_ptr, ticket_ptr, status_ptr, blocks, flags, eps,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, ASCENT: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Add ||T_w g||^2 of a table to the status; finish the norm with the last table (arXiv 2010.01412, equation 2).

        T_w = |w| + eta in adaptive groups (arXiv 2102.11600), else 1; without ASCENT always 1, for the update
        ascent_norm = sqrt(sum);  inverse_norm = 1 / (ascent_norm + eps), 0 where the gradient gives no direction

    Every program adds up its blocks and leaves one sum in a slot. The last program to finish takes the last ticket and
    adds the slots. Every order is fixed, so that equal inputs give equal sums, bit for bit.

    Args:
        slots_ptr: SLOTS numbers of the status's type.
        ticket_ptr: an int32 that is 0 between launches.
        blocks: of the table.
        flags: bits of layout.py: RESET, FINISH, KEEP_SKIP.
    """
    S: tl.constexpr = status_ptr.dtype.element_ty
    number = tl.program_id(0)
    sums = tl.zeros([BLOCK], S)
    while number < blocks:
        block = find_block(block_row_ptr, rows_ptr, number, BLOCK)
        grad_ptr = load_pointer(grads_ptr + block.row, G)
        weight_ptr = grad_ptr
        eta = 0.0
        adaptive = False
        if ASCENT:
            # At this time the params are unperturbed, and the backups are not written yet.
            weight_ptr = load_pointer(block.row_ptr + (CLEAN if MASTERS else PARAM), tl.float32 if MASTERS else P)
            group_ptr = groups_ptr + tl.load(block.row_ptr + GROUP) * GROUP_SIZE
            eta = tl.load(group_ptr + ETA)
            adaptive = is_set(tl.load(group_ptr + ADAPTIVE))
        path = path_of(address(grad_ptr) | address(weight_ptr), block, BLOCK)
        if path == WHOLE:
            sums += _squares(block, grad_ptr, weight_ptr, adaptive, eta, S, ASCENT, BLOCK, WHOLE)
        elif path == EVEN:
            sums += _squares(block, grad_ptr, weight_ptr, adaptive, eta, S, ASCENT, BLOCK, EVEN)
        else:
            sums += _squares(block, grad_ptr, weight_ptr, adaptive, eta, S, ASCENT, BLOCK, ODD)
        number += tl.num_programs(0)
    tl.store(slots_ptr + tl.program_id(0), tl.sum(sums))
    if is_last(ticket_ptr):
        total = sum_slots(slots_ptr, SLOTS)
        if (flags & RESET) == 0:
            total += tl.load(status_ptr + SUM)
        tl.store(status_ptr + SUM, total)
        if (flags & FINISH) != 0:
            _finish(status_ptr, total, eps, flags, ASCENT)


@triton.jit(do_not_specialize=["flags", "eps"], do_not_specialize_on_alignment=POINTERS)
def finish_norm(status_ptr, flags, eps, ASCENT: tl.constexpr):
    """Finish the norm of a sum that is in the status, as `norm` does with FINISH."""
    _finish(status_ptr, tl.load(status_ptr + SUM), eps, flags, ASCENT)


@triton.jit
def _block_squares(
    block, grad_ptr, weight_ptr, moment_ptr, adaptive, eta, unbias, S: tl.constexpr, PRECONDITIONED: tl.constexpr,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Return the sums of (T_w g)^2 and, with WEIGHTS, of w^2 over a block."""
    here = mask_if(True, block, BLOCK, PATH)
    if PRECONDITIONED:
        g = tl.load(elements(grad_ptr, block, BLOCK, PATH), here, 0).to(tl.float32)
        v = tl.load(elements(moment_ptr, block, BLOCK, PATH), here, 0)
        scaled = g.to(S) * g.to(S) * preconditioner(v, unbias, eta).to(S)
    else:
        scaled = _squares(block, grad_ptr, weight_ptr, adaptive, eta, S, True, BLOCK, PATH)
    of_weights = tl.zeros([BLOCK], S)
    if WEIGHTS:
        w = tl.load(elements(weight_ptr, block, BLOCK, PATH), here, 0).to(S)
        of_weights = w * w
    return tl.sum(scaled), tl.sum(of_weights)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=POINTERS)
def squares(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, unbias_ptr, partial_ptr, blocks,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, PRECONDITIONED: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums of squares of T_w g and of the weights of every block, for `row_sums`.

    T_w is as in `norm` or, with PRECONDITIONED, T_w^2 = 1 / (sqrt(v) * unbias + eps) (arXiv 2502.02407).

    Args:
        unbias_ptr: a number per row.
        partial_ptr: a number per block for T_w g, and after them for the weights.
        blocks: of the table.
    """
    S: tl.constexpr = partial_ptr.dtype.element_ty
    number = tl.program_id(0)
    block = find_block(block_row_ptr, rows_ptr, number, BLOCK)
    grad_ptr = load_pointer(grads_ptr + block.row, G)
    weight_ptr = load_pointer(block.row_ptr + (CLEAN if MASTERS else PARAM), tl.float32 if MASTERS else P)
    group_ptr = groups_ptr + tl.load(block.row_ptr + GROUP) * GROUP_SIZE
    eta = tl.load(group_ptr + ETA)
    adaptive = is_set(tl.load(group_ptr + ADAPTIVE))
    moment_ptr = grad_ptr
    unbias = 0.0
    if PRECONDITIONED:
        moment_ptr = load_pointer(block.row_ptr + STATE, tl.float32)
        unbias = tl.load(unbias_ptr + block.row).to(tl.float32)
    path = path_of(address(grad_ptr) | address(weight_ptr) | address(moment_ptr), block, BLOCK)
    if path == WHOLE:
        scaled, of_weights = _block_squares(
            block, grad_ptr, weight_ptr, moment_ptr, adaptive, eta, unbias, S, PRECONDITIONED, WEIGHTS, BLOCK, WHOLE
        )
    elif path == EVEN:
        scaled, of_weights = _block_squares(
            block, grad_ptr, weight_ptr, moment_ptr, adaptive, eta, unbias, S, PRECONDITIONED, WEIGHTS, BLOCK, EVEN
        )
    else:
        scaled, of_weights = _block_squares(
            block, grad_ptr, weight_ptr, moment_ptr, adaptive, eta, unbias, S, PRECONDITIONED, WEIGHTS, BLOCK, ODD
        )
    tl.store(partial_ptr + number, scaled)
    if WEIGHTS:
        tl.store(partial_ptr + blocks + number, of_weights)


@triton.jit
def _row_sum(partial_ptr, count):
    total = tl.zeros([128], partial_ptr.dtype.element_ty)
    first = 0
    while first < count:
        at = first + tl.arange(0, 128)
        total += tl.load(partial_ptr + at, at < count, 0)
        first += 128
    return tl.sum(total)


@triton.jit(do_not_specialize=["blocks", "rows"], do_not_specialize_on_alignment=POINTERS)
def row_sums(rows_ptr, partial_ptr, sums_ptr, blocks, rows, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up what `squares` has left for the blocks of a row, in a fixed order.

    Args:
        sums_ptr: a number per row for T_w g, and after them for the weights.
        blocks, rows: of the table.
    """
    row = tl.program_id(0)
    row_ptr = rows_ptr + row.to(tl.int64) * ROW
    first_ptr = partial_ptr + tl.load(row_ptr + FIRST_BLOCK)
    count = tl.cdiv(tl.load(row_ptr + SIZE), BLOCK)
    tl.store(sums_ptr + row, _row_sum(first_ptr, count))
    if WEIGHTS:
        tl.store(sums_ptr + rows + row, _row_sum(first_ptr + blocks, count))
