"""What the update kernels share: the undo of the perturbation and one step of the base optimizer, in one pass.

Each rule of contract.RULES has a file of its name with its formula and its kernel. The kernel loads the numbers of the
rule, and `run_update` calls the formula on each block. The kernels read what norm.py describes, and

    lrs         int64 (groups)   addresses of the learning rates, each one fp32 number
    grad_scale  fp32             one number by which every gradient is divided
    max_norm                     to which the gradients' global norm is clipped; inf: no clipping

With MASTERS a kernel also writes the masters. With ROUND bf16 and fp16 params are rounded stochastically.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_sam.backends import contract

from . import layout
from .blocks import (
    EVEN,
    ODD,
    WHOLE,
    address,
    elements,
    find_block,
    load_pointer,
    mask_if,
    number_from_the_end,
    path_of,
)  # fmt: skip
from .rng import rounded_to

PARAM = tl.constexpr(layout.PARAM)
CLEAN = tl.constexpr(layout.CLEAN)
GROUP = tl.constexpr(layout.GROUP)
GROUP_SIZE = tl.constexpr(layout.GROUP_SIZE)
SIGN = tl.constexpr(layout.SIGN)

SKIP = tl.constexpr(contract.SKIP)
UPDATE_NORM = tl.constexpr(contract.UPDATE_NORM)
ROUND_UPDATED = tl.constexpr(contract.ROUND_UPDATED)


class Update(NamedTuple):
    """What every rule reads for a block."""

    group_ptr: Any
    status_ptr: Any
    param_ptr: Any
    clean_ptr: Any  # master, backup, or the param itself
    grad_ptr: Any
    lr: Any
    unscale: Any  # of the gradient: the sign over the loss scale
    max_norm: Any
    move: Any  # False if skip is set


@triton.jit
def _grad_factor(u):
    """Return what multiplies gradients: `unscale`, times the factor of torch.nn.utils.clip_grad_norm_."""
    factor = u.unscale
    if u.max_norm <= 3e38:
        clip = tl.div_rn(u.max_norm, tl.load(u.status_ptr + UPDATE_NORM).to(tl.float32) * tl.abs(factor) + 1e-6)
        factor *= tl.where(clip < 1.0, clip, 1.0)
    return factor


@triton.jit
def begin_update(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, lrs_ptr, status_ptr, grad_scale_ptr, max_norm,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return this program's block, and what every rule reads for it."""
    block = find_block(block_row_ptr, rows_ptr, number_from_the_end(), BLOCK)
    k = tl.load(block.row_ptr + GROUP)
    group_ptr = groups_ptr + k * GROUP_SIZE
    return block, Update(
        group_ptr,
        status_ptr,
        load_pointer(block.row_ptr + PARAM, P),
        load_pointer(block.row_ptr + CLEAN, tl.float32 if MASTERS else P),
        load_pointer(grads_ptr + block.row, G),
        tl.load(load_pointer(lrs_ptr + k, tl.float32)),
        tl.div_rn(tl.load(group_ptr + SIGN), tl.load(grad_scale_ptr)),
        max_norm,
        tl.where(tl.load(status_ptr + SKIP) != 0, False, True),
    )


@triton.jit
def _update_block(
    block, u, own, factor, RULE: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    here = mask_if(True, block, BLOCK, PATH)
    moved = mask_if(u.move, block, BLOCK, PATH)
    old = tl.load(elements(u.clean_ptr, block, BLOCK, PATH), here, 0)
    g = tl.load(elements(u.grad_ptr, block, BLOCK, PATH), moved, 0).to(tl.float32)
    new = RULE(old.to(tl.float32), factor * g, block, u, own, BLOCK, PATH)
    P: tl.constexpr = u.param_ptr.dtype.element_ty
    if MASTERS:
        tl.store(elements(u.clean_ptr, block, BLOCK, PATH), new, moved)
        tl.store(elements(u.param_ptr, block, BLOCK, PATH), tl.where(u.move, new, old).to(P), here)
    else:
        purpose: tl.constexpr = ROUND_UPDATED if ROUND else None
        rounded = rounded_to(P, new, block, u.group_ptr, u.status_ptr, purpose, BLOCK)
        tl.store(elements(u.param_ptr, block, BLOCK, PATH), tl.where(u.move, rounded, old), here)


@triton.jit
def run_update(
    block, u, own, addresses, RULE: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """Update a block, or copy its clean values to its params where skip is set.

    Args:
        own: what the rule has loaded for the block.
        addresses: of the state buffers, joined by a bitwise or.
        RULE: a function (w, d, block, u, own, BLOCK, PATH) that writes the state and returns the new param. w is the
            unperturbed param, and d the gradient, unscaled and clipped; both are fp32.
    """
    factor = _grad_factor(u)
    addresses = addresses | address(u.param_ptr) | address(u.clean_ptr) | address(u.grad_ptr)
    path = path_of(addresses, block, BLOCK)
    if path == WHOLE:
        _update_block(block, u, own, factor, RULE, MASTERS, ROUND, BLOCK, WHOLE)
    elif path == EVEN:
        _update_block(block, u, own, factor, RULE, MASTERS, ROUND, BLOCK, EVEN)
    else:
        _update_block(block, u, own, factor, RULE, MASTERS, ROUND, BLOCK, ODD)
