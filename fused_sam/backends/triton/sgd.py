"""torch.optim.SGD's step as a Triton kernel. update.py has what it shares with the other rules."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
from .blocks import POINTERS, address, elements, is_set, mask_if
from .update import begin_update, run_update

MOMENTUM_BUFFER = tl.constexpr(layout.state_place(contract.SGD, "momentum_buffer"))
WEIGHT_DECAY = tl.constexpr(layout.place(contract.SGDGroup, "weight_decay"))
MOMENTUM = tl.constexpr(layout.place(contract.SGDGroup, "momentum"))
ONE_MINUS_DAMPENING = tl.constexpr(layout.place(contract.SGDGroup, "one_minus_dampening"))
NESTEROV = tl.constexpr(layout.place(contract.SGDGroup, "nesterov"))


class SGDStep(NamedTuple):
    """What the sgd kernel reads for a block besides Update."""

    buffer_ptr: Any  # 0 without momentum
    momentum: Any
    one_minus_dampening: Any  # 1 without momentum
    nesterov: Any
    weight_decay: Any


@triton.jit
def _step(w, d, block, u, own, BLOCK: tl.constexpr, PATH: tl.constexpr):
    """Return the new param, and write the momentum buffer."""
    with_momentum = mask_if(u.move & is_set(address(own.buffer_ptr)), block, BLOCK, PATH)
    buffer = elements(own.buffer_ptr, block, BLOCK, PATH)
    before = tl.load(buffer, with_momentum, 0)
    d += own.weight_decay * w
    after = own.momentum * before + own.one_minus_dampening * d
    # A buffer of -0.0 has never been written. Adding 0.0 turns a result of -0.0 into 0.0.
    after = tl.where(before.to(tl.int32, bitcast=True) == -2147483648, d, after) + 0.0
    tl.store(buffer, after, with_momentum)
    return w - u.lr * tl.where(own.nesterov, d + own.momentum * after, after)


@triton.jit(do_not_specialize=["max_norm"], do_not_specialize_on_alignment=POINTERS)
def sgd(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one step of torch.optim.SGD from the backups or masters (Sutskever et al., ICML 2013).

        d = factor * g + weight_decay * w;  w = w - lr * m
        m = momentum * m + (1 - dampening) * d, and m = d the first time

    With Nesterov's momentum w = w - lr * (d + momentum * m). Without momentum m = d, and no buffer is read or written.
    """
    block, u = begin_update(
        block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
        P, G, MASTERS, BLOCK,
    )  # fmt: skip
    buffer = tl.load(block.row_ptr + MOMENTUM_BUFFER)
    momentum = tl.load(u.group_ptr + MOMENTUM)
    buffer = tl.where(momentum != 0, buffer, 0)
    own = SGDStep(
        buffer.to(tl.pointer_type(tl.float32)),
        tl.where(buffer != 0, momentum, 0.0),
        tl.where(buffer != 0, tl.load(u.group_ptr + ONE_MINUS_DAMPENING), 1.0),
        is_set(tl.load(u.group_ptr + NESTEROV)),
        tl.load(u.group_ptr + WEIGHT_DECAY),
    )
    run_update(block, u, own, buffer, _step, MASTERS, ROUND, BLOCK)
