"""SAM's own primitives as Triton kernels, P1 to P3: norm, perturb, sgd and restore, one launch each for a whole table.

Beside the table of triton_blocks.py, whose names these are, a kernel reads

    gradients  int64 (rows)        addresses of the gradients
    hyper      fp32 (groups, 16)   hyper-parameters, places below
    rates      int64 (groups)      addresses of the learning rates, each one fp32
    status     fp32 (8)            what the primitives leave for each other, places in contract.py

Arithmetic is fp32, and a weight is rounded once, when it is written. Sums have the status's type.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from . import contract
from .triton_blocks import (
    BACKUP,
    EVEN,
    GROUP,
    MOMENTUM,
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

RHO = tl.constexpr(0)
ETA = tl.constexpr(1)
ADAPTIVE = tl.constexpr(2)  # 0 or 1
RATE = tl.constexpr(3)  # where rates[group] points unless the learning rate is a tensor
DECAY = tl.constexpr(4)  # weight decay
MU = tl.constexpr(5)  # momentum
KEEP = tl.constexpr(6)  # 1 - dampening, subtracted in double on the host as torch does
NESTEROV = tl.constexpr(7)  # 0 or 1
SIGN = tl.constexpr(8)  # -1 to maximize, else 1
HYPER = tl.constexpr(16)

BEGIN = tl.constexpr(1)  # bits of norm's flags
FINISH = tl.constexpr(2)
CARRY = tl.constexpr(4)

SUM = tl.constexpr(contract.SUM)
NORM = tl.constexpr(contract.NORM)
INVERSE = tl.constexpr(contract.INVERSE)
SKIP = tl.constexpr(contract.SKIP)
UPDATE_NORM = tl.constexpr(contract.UPDATE_NORM)


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


@triton.jit(do_not_specialize=["blocks", "flags", "eps"], do_not_specialize_on_alignment=POINTERS)
def norm(
    owner, rows, gradients, hyper, slots, counter, status, blocks, flags, eps,
    W: tl.constexpr, G: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """P1: sum of (T_w g)^2 over all tensors, T_w = |w| + eta where adaptive (arXiv 2102.11600, section 3), else 1.

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
            tl.store(status + SKIP, bad.to(S))


@triton.jit
def _perturb_block(
    w, g, b, begin, count, move, step, adaptive, eta,
    W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    here = inside(count, True, BLOCK, PATH)
    moved = inside(count, move, BLOCK, PATH)
    weights = lanes(w, begin, W, BLOCK, PATH)
    old = tl.load(weights, here, 0)
    x = tl.load(lanes(g, begin, G, BLOCK, PATH), moved, 0).to(tl.float32)
    v = old.to(tl.float32)
    t = tl.where(adaptive, tl.abs(v) + eta, 1.0)
    tl.store(lanes(b, begin, W, BLOCK, PATH), old, here)
    tl.store(weights, (v + step * (t * (t * x))).to(W), moved)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def perturb(
    owner, rows, gradients, hyper, status, W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """P2: backup = w; then, unless SKIP is set, w += rho * INVERSE * T_w^2 g.

    SAM's equation 2 for p = 2 (arXiv 2010.01412), ASAM's equation 5 where adaptive (arXiv 2102.11600).
    """
    row, entry, begin, count = find(owner, rows, from_the_end(), BLOCK)
    g = tl.load(gradients + row)
    w = tl.load(entry + WEIGHT)
    b = tl.load(entry + BACKUP)
    group = hyper + tl.load(entry + GROUP) * HYPER
    adaptive = is_set(tl.load(group + ADAPTIVE))
    eta = tl.load(group + ETA)
    step = tl.load(group + RHO) * tl.load(status + INVERSE).to(tl.float32)
    move = tl.where(tl.load(status + SKIP) != 0, False, True)
    path = path_of(w | g | b, count, BLOCK)
    if path == WHOLE:
        _perturb_block(w, g, b, begin, count, move, step, adaptive, eta, W, G, BLOCK, WHOLE)
    elif path == EVEN:
        _perturb_block(w, g, b, begin, count, move, step, adaptive, eta, W, G, BLOCK, EVEN)
    else:
        _perturb_block(w, g, b, begin, count, move, step, adaptive, eta, W, G, BLOCK, ODD)


@triton.jit
def _sgd_block(
    w, g, b, m, begin, count, move, factor, decay, mu, keep, nesterov, rate,
    W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    here = inside(count, True, BLOCK, PATH)
    moved = inside(count, move, BLOCK, PATH)
    with_momentum = inside(count, move & is_set(m), BLOCK, PATH)
    old = tl.load(lanes(b, begin, W, BLOCK, PATH), here, 0)
    x = tl.load(lanes(g, begin, G, BLOCK, PATH), moved, 0).to(tl.float32)
    momenta = lanes(m, begin, tl.float32, BLOCK, PATH)
    before = tl.load(momenta, with_momentum, 0)
    v = old.to(tl.float32)
    d = factor * x + decay * v
    after = mu * before + keep * d
    # -0.0 has never been written; + 0.0 keeps it from being written.
    after = tl.where(before.to(tl.int32, bitcast=True) == -2147483648, d, after) + 0.0
    tl.store(momenta, after, with_momentum)
    d = tl.where(nesterov, d + mu * after, after)
    new = (v - rate * d).to(W)
    tl.store(lanes(w, begin, W, BLOCK, PATH), tl.where(move, new, old), here)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def sgd(
    owner, rows, gradients, hyper, rates, status, scale, W: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """P3: torch.optim.SGD's step from the backups (Sutskever et al., ICML 2013), or their copy where SKIP is set.

        d = g / scale + decay * w;  m = mu * m + (1 - dampening) * d, and m = d the first time;  w = w - rate * m

    With Nesterov's momentum w = w - rate * (d + mu * m); without momentum m is d; -g for g to maximize.
    """
    row, entry, begin, count = find(owner, rows, from_the_end(), BLOCK)
    g = tl.load(gradients + row)
    w = tl.load(entry + WEIGHT)
    b = tl.load(entry + BACKUP)
    m = tl.load(entry + MOMENTUM)
    k = tl.load(entry + GROUP)
    group = hyper + k * HYPER
    mu = tl.load(group + MU)
    m = tl.where(mu != 0, m, 0)
    mu = tl.where(m != 0, mu, 0.0)
    keep = tl.where(m != 0, tl.load(group + KEEP), 1.0)
    nesterov = is_set(tl.load(group + NESTEROV))
    decay = tl.load(group + DECAY)
    factor = tl.div_rn(tl.load(group + SIGN), tl.load(scale))
    rate = tl.load(tl.load(rates + k).to(tl.pointer_type(tl.float32)))
    move = tl.where(tl.load(status + SKIP) != 0, False, True)
    path = path_of(w | g | b | m, count, BLOCK)
    if path == WHOLE:
        _sgd_block(w, g, b, m, begin, count, move, factor, decay, mu, keep, nesterov, rate, W, G, BLOCK, WHOLE)
    elif path == EVEN:
        _sgd_block(w, g, b, m, begin, count, move, factor, decay, mu, keep, nesterov, rate, W, G, BLOCK, EVEN)
    else:
        _sgd_block(w, g, b, m, begin, count, move, factor, decay, mu, keep, nesterov, rate, W, G, BLOCK, ODD)


@triton.jit
def _restore_block(w, b, begin, count, W: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr):
    here = inside(count, True, BLOCK, PATH)
    tl.store(lanes(w, begin, W, BLOCK, PATH), tl.load(lanes(b, begin, W, BLOCK, PATH), here, 0), here)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def restore(owner, rows, W: tl.constexpr, BLOCK: tl.constexpr):
    """w = backup, bit for bit."""
    _, entry, begin, count = find(owner, rows, tl.program_id(0), BLOCK)
    w = tl.load(entry + WEIGHT)
    b = tl.load(entry + BACKUP)
    path = path_of(w | b, count, BLOCK)
    if path == WHOLE:
        _restore_block(w, b, begin, count, W, BLOCK, WHOLE)
    elif path == EVEN:
        _restore_block(w, b, begin, count, W, BLOCK, EVEN)
    else:
        _restore_block(w, b, begin, count, W, BLOCK, ODD)
