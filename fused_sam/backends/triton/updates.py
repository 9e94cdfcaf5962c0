"""The fused updates as Triton kernels, P3 and P7: sgd and adam, from the backups into the weights.

What they read stands in passes.py. With models (M) the weights are masters: written in place, and rounded to
the nearest number of type M into the models. With ROUND, bf16 and fp16 weights round at random.
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
    ROW,
    WEIGHT,
    WHOLE,
    find,
    from_the_end,
    inside,
    is_last,
    is_set,
    lanes,
    path_of,
)  # fmt: skip
from .rng import rounded_to

MOMENTUM = tl.constexpr(layout.MOMENTUM)
SQUARE = tl.constexpr(layout.SQUARE)
LARGEST = tl.constexpr(layout.LARGEST)
STEP = tl.constexpr(layout.STEP)

HYPER = tl.constexpr(layout.HYPER)
DECAY = tl.constexpr(layout.DECAY)
MU = tl.constexpr(layout.MU)
KEEP = tl.constexpr(layout.KEEP)
NESTEROV = tl.constexpr(layout.NESTEROV)
SIGN = tl.constexpr(layout.SIGN)
MAX_NORM = tl.constexpr(layout.MAX_NORM)
BETA1 = tl.constexpr(layout.BETA1)
KEEP1 = tl.constexpr(layout.KEEP1)
BETA2 = tl.constexpr(layout.BETA2)
KEEP2 = tl.constexpr(layout.KEEP2)
LOG1 = tl.constexpr(layout.LOG1)
LOG2 = tl.constexpr(layout.LOG2)
EPSILON = tl.constexpr(layout.EPSILON)
DECOUPLED = tl.constexpr(layout.DECOUPLED)
AMSGRAD = tl.constexpr(layout.AMSGRAD)

SKIP = tl.constexpr(contract.SKIP)
UPDATE_NORM = tl.constexpr(contract.UPDATE_NORM)
ROUND_UPDATED = tl.constexpr(contract.ROUND_UPDATED)


@triton.jit
def _gradient_factor(group, status, scale):
    """What an update multiplies gradients by: the loss scale undone, the sign, and torch's clip_grad_norm_."""
    factor = tl.div_rn(tl.load(group + SIGN), tl.load(scale))
    limit = tl.load(group + MAX_NORM)
    if limit <= 3e38:
        clip = tl.div_rn(limit, tl.load(status + UPDATE_NORM).to(tl.float32) * tl.abs(factor) + 1e-6)
        factor *= tl.where(clip < 1.0, clip, 1.0)
    return factor


@triton.jit
def _write(
    w, model, group, entry, status, begin, count, move, y, old,
    W: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """The new weight y, or where nothing may move the `old` one."""
    here = inside(count, True, BLOCK, PATH)
    if M is None:
        new = rounded_to(y, group, entry, status, begin, ROUND_UPDATED if ROUND else None, W, BLOCK)
        tl.store(lanes(w, begin, W, BLOCK, PATH), tl.where(move, new, old), here)
    else:
        tl.store(lanes(w, begin, W, BLOCK, PATH), y, inside(count, move, BLOCK, PATH))
        tl.store(lanes(model, begin, M, BLOCK, PATH), tl.where(move, y, old).to(M), here)


@triton.jit
def _sgd_block(
    w, g, b, m, model, group, entry, status, begin, count, move, factor, decay, mu, keep, nesterov, rate,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr,
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
    _write(w, model, group, entry, status, begin, count, move, v - rate * d, old, W, M, ROUND, BLOCK, PATH)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def sgd(
    owner, rows, gradients, hyper, rates, status, scale,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P3: torch.optim.SGD's step from the backups (Sutskever et al., ICML 2013), or their copy where SKIP is set.

        d = g / scale + decay * w;  m = mu * m + (1 - dampening) * d, and m = d the first time;  w = w - rate * m

    With Nesterov's momentum w = w - rate * (d + mu * m); without momentum m is d; -g for g to maximize.
    """
    row, entry, begin, count = find(owner, rows, from_the_end(), BLOCK)
    g = tl.load(gradients + row)
    w = tl.load(entry + WEIGHT)
    b = w  # a master is its own backup
    if M is None:
        b = tl.load(entry + BACKUP)
    m = tl.load(entry + MOMENTUM)
    model = w
    if M is not None:
        model = tl.load(entry + MODEL)
    k = tl.load(entry + GROUP)
    group = hyper + k * HYPER
    mu = tl.load(group + MU)
    m = tl.where(mu != 0, m, 0)
    mu = tl.where(m != 0, mu, 0.0)
    keep = tl.where(m != 0, tl.load(group + KEEP), 1.0)
    nesterov = is_set(tl.load(group + NESTEROV))
    decay = tl.load(group + DECAY)
    factor = _gradient_factor(group, status, scale)
    rate = tl.load(tl.load(rates + k).to(tl.pointer_type(tl.float32)))
    move = tl.where(tl.load(status + SKIP) != 0, False, True)
    path = path_of(w | g | b | m if M is None else w | g | b | m | model, count, BLOCK)
    if path == WHOLE:
        _sgd_block(
            w, g, b, m, model, group, entry, status, begin, count, move, factor, decay, mu, keep, nesterov, rate,
            W, G, M, ROUND, BLOCK, WHOLE,
        )  # fmt: skip
    elif path == EVEN:
        _sgd_block(
            w, g, b, m, model, group, entry, status, begin, count, move, factor, decay, mu, keep, nesterov, rate,
            W, G, M, ROUND, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _sgd_block(
            w, g, b, m, model, group, entry, status, begin, count, move, factor, decay, mu, keep, nesterov, rate,
            W, G, M, ROUND, BLOCK, ODD,
        )  # fmt: skip


@triton.jit
def bias_correction(log_beta, t):
    """1 - beta^t, also where beta^t is near 1: the series of -expm1(x) down to x = -1, which 11 terms end in fp32."""
    x = log_beta * t
    series = 1.0 + x * 0.0
    for n in tl.static_range(11, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return tl.where(x > -1.0, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adam_block(
    w, g, b, m, s, largest, model, group, entry, status, begin, count, move, factor, decay, shrink, rate, unbias,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    here = inside(count, True, BLOCK, PATH)
    moved = inside(count, move, BLOCK, PATH)
    means = lanes(m, begin, tl.float32, BLOCK, PATH)
    squares = lanes(s, begin, tl.float32, BLOCK, PATH)
    old = tl.load(lanes(b, begin, W, BLOCK, PATH), here, 0)
    x = tl.load(lanes(g, begin, G, BLOCK, PATH), moved, 0).to(tl.float32)
    mean = tl.load(means, moved, 0)
    square = tl.load(squares, moved, 0)
    v = old.to(tl.float32)
    d = factor * x + decay * v
    mean = tl.load(group + BETA1) * mean + tl.load(group + KEEP1) * d
    square = tl.load(group + BETA2) * square + tl.load(group + KEEP2) * d * d
    tl.store(means, mean, moved)
    tl.store(squares, square, moved)
    if LARGE:
        with_largest = inside(count, move & is_set(largest), BLOCK, PATH)
        peaks = lanes(largest, begin, tl.float32, BLOCK, PATH)
        square = tl.maximum(tl.load(peaks, with_largest, 0), square, propagate_nan=tl.PropagateNan.ALL)
        tl.store(peaks, square, with_largest)
    y = shrink * v - rate * (mean / (tl.sqrt_rn(square) * unbias + tl.load(group + EPSILON)))
    _write(w, model, group, entry, status, begin, count, move, y, old, W, M, ROUND, BLOCK, PATH)


@triton.jit
def _count_steps(rows, tensors):
    first = 0
    while first < tensors:
        row = first + tl.arange(0, 128)
        here = row < tensors
        steps = tl.load(rows + row.to(tl.int64) * ROW + STEP, here, 0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, here, 0) + 1.0, here)
        first += 128


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=POINTERS)
def adam(
    owner, rows, gradients, hyper, rates, counter, status, scale, tensors,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """P7: torch.optim.Adam's (arXiv 1412.6980, algorithm 1) or AdamW's step (arXiv 1711.05101, algorithm 2).

        d = g / scale + decay * w;  m = beta1 * m + (1 - beta1) * d;  s = beta2 * s + (1 - beta2) * d^2
        w = w - rate / (1 - beta1^t) * m / (sqrt(s / (1 - beta2^t)) + eps)

    Decoupled, the decay is not in d: w becomes (1 - rate * decay) w first. With LARGE, groups with amsgrad divide by
    the largest s so far. Where SKIP is set the backups are copied, and nothing else is written. The last program to
    finish counts the tensors' steps t up, when all have read theirs.
    """
    row, entry, begin, count = find(owner, rows, from_the_end(), BLOCK)
    g = tl.load(gradients + row)
    w = tl.load(entry + WEIGHT)
    b = w  # a master is its own backup
    if M is None:
        b = tl.load(entry + BACKUP)
    m = tl.load(entry + MOMENTUM)
    s = tl.load(entry + SQUARE)
    t = tl.load(tl.load(entry + STEP).to(tl.pointer_type(tl.float32))) + 1.0
    k = tl.load(entry + GROUP)
    group = hyper + k * HYPER
    model = w
    if M is not None:
        model = tl.load(entry + MODEL)
    largest = s
    if LARGE:
        largest = tl.where(tl.load(group + AMSGRAD) != 0, tl.load(entry + LARGEST), 0)
    rate = tl.load(tl.load(rates + k).to(tl.pointer_type(tl.float32)))
    decay = tl.load(group + DECAY)
    decoupled = is_set(tl.load(group + DECOUPLED))
    shrink = tl.where(decoupled, 1.0 - rate * decay, 1.0)
    decay = tl.where(decoupled, 0.0, decay)
    rate = tl.div_rn(rate, bias_correction(tl.load(group + LOG1), t))
    unbias = tl.div_rn(1.0, tl.sqrt_rn(bias_correction(tl.load(group + LOG2), t)))
    factor = _gradient_factor(group, status, scale)
    move = tl.where(tl.load(status + SKIP) != 0, False, True)
    path = path_of(w | g | b | m | s | largest | model, count, BLOCK)
    if path == WHOLE:
        _adam_block(
            w, g, b, m, s, largest, model, group, entry, status, begin, count, move, factor, decay, shrink, rate,
            unbias, W, G, M, ROUND, LARGE, BLOCK, WHOLE,
        )  # fmt: skip
    elif path == EVEN:
        _adam_block(
            w, g, b, m, s, largest, model, group, entry, status, begin, count, move, factor, decay, shrink, rate,
            unbias, W, G, M, ROUND, LARGE, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _adam_block(
            w, g, b, m, s, largest, model, group, entry, status, begin, count, move, factor, decay, shrink, rate,
            unbias, W, G, M, ROUND, LARGE, BLOCK, ODD,
        )  # fmt: skip
    if is_last(counter) and move:
        _count_steps(rows, tensors)
