"""SAM's own primitives as Triton kernels: norm with its end, perturb and restore, one launch each for a whole table.

Beside the table of blocks.py a kernel of these and of updates.py reads

    gradients  int64 (rows)        addresses of the gradients
    hyper      fp32 (groups, 32)   hyper-parameters, places in layout.py
    rates      int64 (groups)      addresses of the learning rates, each one fp32
    status     fp32 (8)            what the primitives leave for each other, places in contract.py

W and G are the types of weights and gradients. M is None, or the models' type, and then the weights are masters.
Arithmetic is fp32, and a weight is rounded once, when it is written. Sums have the status's type.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
from .blocks import (
    BACKUP,
    EVEN,
    GROUP,
    MODEL,
    ODD,
    POINTERS,
    WEIGHT,
    WHOLE,
    find,
    from_the_end,
    inside,
    is_last,
    is_set,
    lanes,
    path_of,
    sum_slots,
)  # fmt: skip
from .rng import chosen, rounded_to, words

RHO = tl.constexpr(layout.RHO)
ETA = tl.constexpr(layout.ETA)
ADAPTIVE = tl.constexpr(layout.ADAPTIVE)
SHARE = tl.constexpr(layout.SHARE)
HYPER = tl.constexpr(layout.HYPER)

BEGIN = tl.constexpr(1)  # bits of norm's flags
FINISH = tl.constexpr(2)
CARRY = tl.constexpr(4)

SUM = tl.constexpr(contract.SUM)
NORM = tl.constexpr(contract.NORM)
INVERSE = tl.constexpr(contract.INVERSE)
SKIP = tl.constexpr(contract.SKIP)
UPDATE_NORM = tl.constexpr(contract.UPDATE_NORM)
MASK = tl.constexpr(contract.MASK)
ROUND_PERTURBED = tl.constexpr(contract.ROUND_PERTURBED)


@triton.jit
def _squares(
    w, g, begin, count, adaptive, eta,
    S: tl.constexpr, W: tl.constexpr, G: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    x = tl.load(lanes(g, begin, G, BLOCK, PATH), inside(count, True, BLOCK, PATH), 0).to(S)
    if SCALED:
        v = tl.load(lanes(w, begin, W, BLOCK, PATH), inside(count, adaptive, BLOCK, PATH), 0).to(S)
        x = x * tl.where(adaptive, tl.abs(v) + eta, 1.0)
    return x * x


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)  # tl.sqrt takes an approximation, and 0 for what is below the normal numbers
    return tl.sqrt(x)


@triton.jit
def _finish(status, total, eps, flags, SCALED: tl.constexpr):
    length = _root(total)
    bad = tl.where(total < float("inf"), 0, 1)
    if SCALED:
        inverse = 1.0 / (length + eps)
        tl.store(status + NORM, length)
        tl.store(status + INVERSE, tl.where((inverse <= 1e30), inverse, 0.0))
    else:
        tl.store(status + UPDATE_NORM, length)
    if (flags & CARRY) != 0:
        bad = tl.where(tl.load(status + SKIP) != 0, 1, bad)
    tl.store(status + SKIP, bad.to(status.dtype.element_ty))


@triton.jit(do_not_specialize=["blocks", "flags", "eps"], do_not_specialize_on_alignment=POINTERS)
def norm(
    owner, rows, gradients, hyper, slots, counter, status, blocks, flags, eps,
    W: tl.constexpr, G: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """P1: sum of (T_w g)^2 over all tensors, T_w = |w| + eta where adaptive (arXiv 2102.11600), else 1.

    Every program adds up its blocks and leaves one sum in a slot; the last one to finish, told by a ticket, adds the
    slots. Each order is fixed, so that equal inputs give equal sums, bit for bit. The weights are read only where
    they count. NORM = sqrt(SUM), INVERSE = 1 / (NORM + eps), 0 where that is no direction (arXiv 2010.01412, eq. 2).
    """
    S: tl.constexpr = status.dtype.element_ty
    block = tl.program_id(0)
    sums = tl.zeros([BLOCK], S)
    while block < blocks:
        row, entry, begin, count = find(owner, rows, block, BLOCK)
        g = tl.load(gradients + row)
        w = g
        eta = 0.0
        adaptive = False
        if SCALED:
            w = tl.load(entry + WEIGHT)
            group = hyper + tl.load(entry + GROUP) * HYPER
            eta = tl.load(group + ETA)
            adaptive = is_set(tl.load(group + ADAPTIVE))
        path = path_of(w | g, count, BLOCK)
        if path == WHOLE:
            sums += _squares(w, g, begin, count, adaptive, eta, S, W, G, SCALED, BLOCK, WHOLE)
        elif path == EVEN:
            sums += _squares(w, g, begin, count, adaptive, eta, S, W, G, SCALED, BLOCK, EVEN)
        else:
            sums += _squares(w, g, begin, count, adaptive, eta, S, W, G, SCALED, BLOCK, ODD)
        block += tl.num_programs(0)
    tl.store(slots + tl.program_id(0), tl.sum(sums))
    if is_last(counter):
        total = sum_slots(slots, SLOTS)
        if (flags & BEGIN) == 0:
            total += tl.load(status + SUM)
        tl.store(status + SUM, total)
        if (flags & FINISH) != 0:
            _finish(status, total, eps, flags, SCALED)


@triton.jit(do_not_specialize=["flags", "eps"], do_not_specialize_on_alignment=POINTERS)
def finish(status, flags, eps, SCALED: tl.constexpr):
    """The end of P1 by itself."""
    _finish(status, tl.load(status + SUM), eps, flags, SCALED)


@triton.jit
def _perturb_block(
    w, g, b, model, group, entry, status, begin, count, move, step, adaptive, eta,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, CHOOSE: tl.constexpr,
    BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    here = inside(count, True, BLOCK, PATH)
    moved = inside(count, move, BLOCK, PATH)
    weights = lanes(w, begin, W, BLOCK, PATH)
    old = tl.load(weights, here if M is None else moved, 0)
    x = tl.load(lanes(g, begin, G, BLOCK, PATH), moved, 0).to(tl.float32)
    v = old.to(tl.float32)
    t = tl.where(adaptive, tl.abs(v) + eta, 1.0)
    if M is None:
        tl.store(lanes(b, begin, W, BLOCK, PATH), old, here)
    y = v + step * (t * (t * x))
    if CHOOSE:
        choice = chosen(words(group, entry, status, begin, MASK, BLOCK), tl.load(group + SHARE))
        y = tl.where(choice, y, v)  # v comes from the weight's type, so that rounding, also at random, keeps it
    if M is None:
        new = rounded_to(y, group, entry, status, begin, ROUND_PERTURBED if ROUND else None, W, BLOCK)
        tl.store(weights, new, moved)
    else:
        tl.store(lanes(model, begin, M, BLOCK, PATH), y.to(M), moved)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def perturb(
    owner, rows, gradients, hyper, status,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, CHOOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P2: backup = w; then, unless SKIP is set, w += rho * INVERSE * T_w^2 g. With models, model = w + that, alone.

    SAM's equation 2 for p = 2 (arXiv 2010.01412), ASAM's where adaptive (arXiv 2102.11600). With CHOOSE only
    the elements that a group's share leaves move (arXiv 2110.03141); with ROUND, weights round at random.
    """
    row, entry, begin, count = find(owner, rows, from_the_end(), BLOCK)
    g = tl.load(gradients + row)
    w = tl.load(entry + WEIGHT)
    b = tl.load(entry + BACKUP)
    model = w
    if M is not None:
        model = tl.load(entry + MODEL)
    group = hyper + tl.load(entry + GROUP) * HYPER
    adaptive = is_set(tl.load(group + ADAPTIVE))
    eta = tl.load(group + ETA)
    step = tl.load(group + RHO) * tl.load(status + INVERSE).to(tl.float32)
    move = tl.where(tl.load(status + SKIP) != 0, False, True)
    path = path_of(w | g | b if M is None else w | g | model, count, BLOCK)
    if path == WHOLE:
        _perturb_block(
            w, g, b, model, group, entry, status, begin, count, move, step, adaptive, eta,
            W, G, M, ROUND, CHOOSE, BLOCK, WHOLE,
        )  # fmt: skip
    elif path == EVEN:
        _perturb_block(
            w, g, b, model, group, entry, status, begin, count, move, step, adaptive, eta,
            W, G, M, ROUND, CHOOSE, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _perturb_block(
            w, g, b, model, group, entry, status, begin, count, move, step, adaptive, eta,
            W, G, M, ROUND, CHOOSE, BLOCK, ODD,
        )  # fmt: skip


@triton.jit
def _restore_block(w, b, begin, count, W: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr):
    here = inside(count, True, BLOCK, PATH)
    tl.store(lanes(w, begin, TO, BLOCK, PATH), tl.load(lanes(b, begin, W, BLOCK, PATH), here, 0).to(TO), here)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def restore(owner, rows, W: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """w = backup, bit for bit. With models, model = w."""
    TO: tl.constexpr = W if M is None else M
    _, entry, begin, count = find(owner, rows, tl.program_id(0), BLOCK)
    w = tl.load(entry + (WEIGHT if M is None else MODEL))
    b = tl.load(entry + BACKUP)
    path = path_of(w | b, count, BLOCK)
    if path == WHOLE:
        _restore_block(w, b, begin, count, W, TO, BLOCK, WHOLE)
    elif path == EVEN:
        _restore_block(w, b, begin, count, W, TO, BLOCK, EVEN)
    else:
        _restore_block(w, b, begin, count, W, TO, BLOCK, ODD)
