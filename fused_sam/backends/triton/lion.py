"""Lion's step as a Triton kernel. update.py has what it shares with the other rules."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
from .blocks import POINTERS, elements, mask_if
from .update import begin_update, run_update

EXP_AVG = tl.constexpr(layout.state_place(contract.LION, "exp_avg"))
WEIGHT_DECAY = tl.constexpr(layout.place(contract.LionGroup, "weight_decay"))
BETA1 = tl.constexpr(layout.place(contract.LionGroup, "beta1"))
ONE_MINUS_BETA1 = tl.constexpr(layout.place(contract.LionGroup, "one_minus_beta1"))
BETA2 = tl.constexpr(layout.place(contract.LionGroup, "beta2"))
ONE_MINUS_BETA2 = tl.constexpr(layout.place(contract.LionGroup, "one_minus_beta2"))


class LionStep(NamedTuple):
    """What the lion kernel reads for a block besides Update."""

    exp_avg_ptr: Any
    shrink: Any  # factor of the param: 1 - lr * weight_decay
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any


@triton.jit
def _step(w, d, block, u, own, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Return the new param, and write the moving average."""
    moved = mask_if(u.move, block, BLOCK, PATH)
    exp_avg = elements(own.exp_avg_ptr, block, BLOCK, PATH)
    m = tl.load(exp_avg, moved, 0)
    c = own.beta1 * m + own.one_minus_beta1 * d
    tl.store(exp_avg, own.beta2 * m + own.one_minus_beta2 * d, moved)
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # 0 stays 0, and NaN stays NaN
    return own.shrink * w - u.lr * sign


@triton.jit(do_not_specialize=["max_norm"], do_not_specialize_on_alignment=POINTERS)
def lion(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one step of Lion from the backups or masters (arXiv 2302.06675, algorithm 2).

        d = factor * g;  w = w - lr * (sign(beta1 * m + (1 - beta1) * d) + weight_decay * w)
        m = beta2 * m + (1 - beta2) * d

    The sign reads the old m.
    """
    block, u = begin_update(
        block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
        P, G, MASTERS, BLOCK,
    )  # fmt: skip
    exp_avg = tl.load(block.row_ptr + EXP_AVG)
    own = LionStep(
        exp_avg.to(tl.pointer_type(tl.float32)),
        1.0 - u.lr * tl.load(u.group_ptr + WEIGHT_DECAY),
        tl.load(u.group_ptr + BETA1),
        tl.load(u.group_ptr + ONE_MINUS_BETA1),
        tl.load(u.group_ptr + BETA2),
        tl.load(u.group_ptr + ONE_MINUS_BETA2),
    )
    run_update(block, u, own, exp_avg, _step, MASTERS, ROUND, BLOCK)
