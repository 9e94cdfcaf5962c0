"""torch.optim.Adam's and AdamW's step as a Triton kernel. update.py has what it shares with the other rules."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
from .blocks import POINTERS, ROW, address, elements, is_last, is_set, load_pointer, mask_if
from .update import begin_update, run_update

EXP_AVG = tl.constexpr(layout.state_place(contract.ADAM, "exp_avg"))
EXP_AVG_SQ = tl.constexpr(layout.state_place(contract.ADAM, "exp_avg_sq"))
MAX_EXP_AVG_SQ = tl.constexpr(layout.state_place(contract.ADAM, "max_exp_avg_sq"))
STEP = tl.constexpr(layout.state_place(contract.ADAM, "step"))

WEIGHT_DECAY = tl.constexpr(layout.place(contract.AdamGroup, "weight_decay"))
BETA1 = tl.constexpr(layout.place(contract.AdamGroup, "beta1"))
ONE_MINUS_BETA1 = tl.constexpr(layout.place(contract.AdamGroup, "one_minus_beta1"))
LOG_BETA1 = tl.constexpr(layout.place(contract.AdamGroup, "log_beta1"))
BETA2 = tl.constexpr(layout.place(contract.AdamGroup, "beta2"))
ONE_MINUS_BETA2 = tl.constexpr(layout.place(contract.AdamGroup, "one_minus_beta2"))
LOG_BETA2 = tl.constexpr(layout.place(contract.AdamGroup, "log_beta2"))
EPS = tl.constexpr(layout.place(contract.AdamGroup, "eps"))
DECOUPLED_WEIGHT_DECAY = tl.constexpr(layout.place(contract.AdamGroup, "decoupled_weight_decay"))
AMSGRAD = tl.constexpr(layout.place(contract.AdamGroup, "amsgrad"))


class AdamStep(NamedTuple):
    """What the adam kernel reads for a block besides Update."""

    exp_avg_ptr: Any
    exp_avg_sq_ptr: Any
    max_exp_avg_sq_ptr: Any  # 0 if the group is without amsgrad
    weight_decay: Any  # Adam's L2 term, 0 for AdamW
    shrink: Any  # factor of the param: 1 - lr * weight_decay for AdamW, 1 for Adam
    rate: Any  # lr / (1 - beta1^t)
    unbias: Any  # 1 / sqrt(1 - beta2^t)
    with_amsgrad: Any  # True if a group of the table has amsgrad; known at compile time


@triton.jit
def bias_correction(log_beta, t):
    """Return 1 - beta^t, exact also where beta^t is near 1.

    Down to x = -1 it is the series of -expm1(x), of which 11 terms are enough for fp32.
    """
    x = log_beta * t
    series = 1.0 + x * 0.0
    for n in tl.static_range(11, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return tl.where(x > -1.0, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _step(w, d, block, u, own, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Return the new param, and write the moving averages."""
    moved = mask_if(u.move, block, BLOCK, PATH)
    exp_avg = elements(own.exp_avg_ptr, block, BLOCK, PATH)
    exp_avg_sq = elements(own.exp_avg_sq_ptr, block, BLOCK, PATH)
    m = tl.load(exp_avg, moved, 0)
    v = tl.load(exp_avg_sq, moved, 0)
    d += own.weight_decay * w
    m = tl.load(u.group_ptr + BETA1) * m + tl.load(u.group_ptr + ONE_MINUS_BETA1) * d
    v = tl.load(u.group_ptr + BETA2) * v + tl.load(u.group_ptr + ONE_MINUS_BETA2) * d * d
    tl.store(exp_avg, m, moved)
    tl.store(exp_avg_sq, v, moved)
    if own.with_amsgrad:
        of_group = mask_if(u.move & is_set(address(own.max_exp_avg_sq_ptr)), block, BLOCK, PATH)
        max_exp_avg_sq = elements(own.max_exp_avg_sq_ptr, block, BLOCK, PATH)
        v = tl.maximum(tl.load(max_exp_avg_sq, of_group, 0), v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(max_exp_avg_sq, v, of_group)
    return own.shrink * w - own.rate * (m / (tl.sqrt_rn(v) * own.unbias + tl.load(u.group_ptr + EPS)))


@triton.jit
def _count_steps(rows_ptr, rows):
    """Add 1 to the step of every row."""
    first = 0
    while first < rows:
        row = first + tl.arange(0, 128)
        here = row < rows
        steps = tl.load(rows_ptr + row.to(tl.int64) * ROW + STEP, here, 0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, here, 0) + 1.0, here)
        first += 128


@triton.jit(do_not_specialize=["max_norm", "rows"], do_not_specialize_on_alignment=POINTERS)
def adam(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm, ticket_ptr, rows,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, WITH_AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one step of torch.optim.Adam (arXiv 1412.6980, algorithm 1) or AdamW (arXiv 1711.05101, algorithm 2).

        d = factor * g + weight_decay * w;  m = beta1 * m + (1 - beta1) * d;  v = beta2 * v + (1 - beta2) * d^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    A decoupled decay is not in d: w becomes (1 - lr * weight_decay) * w first. With WITH_AMSGRAD, groups with amsgrad
    divide by the largest v so far. The last program to finish adds 1 to every step t, after all have read theirs.

    Args:
        ticket_ptr: an int32 that is 0 between launches.
        rows: of the table.
    """
    block, u = begin_update(
        block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
        P, G, MASTERS, BLOCK,
    )  # fmt: skip
    exp_avg = tl.load(block.row_ptr + EXP_AVG)
    exp_avg_sq = tl.load(block.row_ptr + EXP_AVG_SQ)
    max_exp_avg_sq = exp_avg_sq
    if WITH_AMSGRAD:
        max_exp_avg_sq = tl.where(tl.load(u.group_ptr + AMSGRAD) != 0, tl.load(block.row_ptr + MAX_EXP_AVG_SQ), 0)
    t = tl.load(load_pointer(block.row_ptr + STEP, tl.float32)) + 1.0
    weight_decay = tl.load(u.group_ptr + WEIGHT_DECAY)
    decoupled = is_set(tl.load(u.group_ptr + DECOUPLED_WEIGHT_DECAY))
    own = AdamStep(
        exp_avg.to(tl.pointer_type(tl.float32)),
        exp_avg_sq.to(tl.pointer_type(tl.float32)),
        max_exp_avg_sq.to(tl.pointer_type(tl.float32)),
        tl.where(decoupled, 0.0, weight_decay),
        tl.where(decoupled, 1.0 - u.lr * weight_decay, 1.0),
        tl.div_rn(u.lr, bias_correction(tl.load(u.group_ptr + LOG_BETA1), t)),
        tl.div_rn(1.0, tl.sqrt_rn(bias_correction(tl.load(u.group_ptr + LOG_BETA2), t))),
        WITH_AMSGRAD,
    )
    run_update(block, u, own, exp_avg | exp_avg_sq | max_exp_avg_sq, _step, MASTERS, ROUND, BLOCK)
    if is_last(ticket_ptr) and u.move:
        _count_steps(rows_ptr, rows)
