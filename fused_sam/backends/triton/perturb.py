"""Into the perturbed point and back as Triton kernels: perturb and restore. norm.py describes what they read."""

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
    POINTERS,
    WHOLE,
    address,
    elements,
    find_block,
    is_set,
    load_pointer,
    mask_if,
    number_from_the_end,
    path_of,
    preconditioner,
)  # fmt: skip
from .rng import in_mask, random_words, rounded_to

PARAM = tl.constexpr(layout.PARAM)
CLEAN = tl.constexpr(layout.CLEAN)
GROUP = tl.constexpr(layout.GROUP)
GROUP_SIZE = tl.constexpr(layout.GROUP_SIZE)
STATE = tl.constexpr(layout.STATE)
RHO = tl.constexpr(layout.place(layout.PerturbNumbers, "rho"))
ETA = tl.constexpr(layout.place(layout.PerturbNumbers, "eta"))
ADAPTIVE = tl.constexpr(layout.place(layout.PerturbNumbers, "adaptive"))
MASK_PROB = tl.constexpr(layout.place(layout.PerturbNumbers, "mask_prob"))

INVERSE_NORM = tl.constexpr(contract.INVERSE_NORM)
SKIP = tl.constexpr(contract.SKIP)
MASK = tl.constexpr(contract.MASK)
ROUND_PERTURBED = tl.constexpr(contract.ROUND_PERTURBED)


class Perturbation(NamedTuple):
    """What `perturb` reads for a block."""

    group_ptr: Any
    status_ptr: Any
    param_ptr: Any
    clean_ptr: Any  # master or backup
    grad_ptr: Any
    length: Any  # rho / (||T_w g|| + eps)
    adaptive: Any
    eta: Any
    moment_ptr: Any  # Adam's second moment, for Precond-SAM; otherwise the gradient
    unbias: Any
    move: Any  # False if skip is set


@triton.jit
def _perturb_block(
    block, p, MASTERS: tl.constexpr, ROUND: tl.constexpr, MASKED: tl.constexpr, PRECONDITIONED: tl.constexpr,
    BLOCK: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    here = mask_if(True, block, BLOCK, PATH)
    moved = mask_if(p.move, block, BLOCK, PATH)
    params = elements(p.param_ptr, block, BLOCK, PATH)
    cleans = elements(p.clean_ptr, block, BLOCK, PATH)
    old = tl.load(cleans if MASTERS else params, moved if MASTERS else here, 0)
    g = tl.load(elements(p.grad_ptr, block, BLOCK, PATH), moved, 0).to(tl.float32)
    w = old.to(tl.float32)
    if PRECONDITIONED:
        v = tl.load(elements(p.moment_ptr, block, BLOCK, PATH), moved, 0)
        direction = preconditioner(v, p.unbias, p.eta) * g
    else:
        t = tl.where(p.adaptive, tl.abs(w) + p.eta, 1.0)
        direction = t * (t * g)
    if not MASTERS:
        tl.store(cleans, old, here)
    new = w + p.length * direction
    if MASKED:
        words = random_words(block, p.group_ptr, p.status_ptr, MASK, BLOCK)
        # w has the param's precision, so that rounding, stochastic rounding included, keeps it.
        new = tl.where(in_mask(words, tl.load(p.group_ptr + MASK_PROB)), new, w)
    P: tl.constexpr = p.param_ptr.dtype.element_ty
    purpose: tl.constexpr = ROUND_PERTURBED if ROUND else None
    tl.store(params, rounded_to(P, new, block, p.group_ptr, p.status_ptr, purpose, BLOCK), moved)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def perturb(
    block_row_ptr, rows_ptr, grads_ptr, groups_ptr, status_ptr, factors_ptr, unbias_ptr,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, ROUND: tl.constexpr, MASKED: tl.constexpr,
    FACTORS: tl.constexpr, PRECONDITIONED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go to the perturbed point (SAM: arXiv 2010.01412, equation 2; ASAM: arXiv 2102.11600).

        backup = w;  w = w + rho * inverse_norm * T_w^2 g, unless skip is set

    With MASTERS the params are rounded from masters + rho * ..., and no backup is written. With MASKED only a random
    choice of elements moves (arXiv 2110.03141). With ROUND bf16 and fp16 params are rounded stochastically.

    Args:
        factors_ptr: with FACTORS, a number per row that multiplies the length of its perturbation.
        unbias_ptr: with PRECONDITIONED, a number per row, and T_w^2 = 1 / (sqrt(v) * unbias + eps) (arXiv 2502.02407).
    """
    block = find_block(block_row_ptr, rows_ptr, number_from_the_end(), BLOCK)
    group_ptr = groups_ptr + tl.load(block.row_ptr + GROUP) * GROUP_SIZE
    grad_ptr = load_pointer(grads_ptr + block.row, G)
    length = tl.load(group_ptr + RHO) * tl.load(status_ptr + INVERSE_NORM).to(tl.float32)
    if FACTORS:
        length *= tl.load(factors_ptr + block.row).to(tl.float32)
    moment_ptr = grad_ptr
    unbias = 0.0
    if PRECONDITIONED:
        moment_ptr = load_pointer(block.row_ptr + STATE, tl.float32)
        unbias = tl.load(unbias_ptr + block.row).to(tl.float32)
    p = Perturbation(
        group_ptr,
        status_ptr,
        load_pointer(block.row_ptr + PARAM, P),
        load_pointer(block.row_ptr + CLEAN, tl.float32 if MASTERS else P),
        grad_ptr,
        length,
        is_set(tl.load(group_ptr + ADAPTIVE)),
        tl.load(group_ptr + ETA),
        moment_ptr,
        unbias,
        tl.where(tl.load(status_ptr + SKIP) != 0, False, True),
    )
    addresses = address(p.param_ptr) | address(p.clean_ptr) | address(p.grad_ptr) | address(moment_ptr)
    path = path_of(addresses, block, BLOCK)
    if path == WHOLE:
        _perturb_block(block, p, MASTERS, ROUND, MASKED, PRECONDITIONED, BLOCK, WHOLE)
    elif path == EVEN:
        _perturb_block(block, p, MASTERS, ROUND, MASKED, PRECONDITIONED, BLOCK, EVEN)
    else:
        _perturb_block(block, p, MASTERS, ROUND, MASKED, PRECONDITIONED, BLOCK, ODD)


@triton.jit
def _restore_block(block, param_ptr, clean_ptr, BLOCK: tl.constexpr, PATH: tl.constexpr):
    here = mask_if(True, block, BLOCK, PATH)
    params = elements(param_ptr, block, BLOCK, PATH)
    clean = tl.load(elements(clean_ptr, block, BLOCK, PATH), here, 0)
    tl.store(params, clean.to(param_ptr.dtype.element_ty), here)


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def restore(block_row_ptr, rows_ptr, P: tl.constexpr, MASTERS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy backups to params, bit for bit; with MASTERS, round the masters into the params."""
    block = find_block(block_row_ptr, rows_ptr, tl.program_id(0), BLOCK)
    param_ptr = load_pointer(block.row_ptr + PARAM, P)
    clean_ptr = load_pointer(block.row_ptr + CLEAN, tl.float32 if MASTERS else P)
    path = path_of(address(param_ptr) | address(clean_ptr), block, BLOCK)
    if path == WHOLE:
        _restore_block(block, param_ptr, clean_ptr, BLOCK, WHOLE)
    elif path == EVEN:
        _restore_block(block, param_ptr, clean_ptr, BLOCK, EVEN)
    else:
        _restore_block(block, param_ptr, clean_ptr, BLOCK, ODD)
