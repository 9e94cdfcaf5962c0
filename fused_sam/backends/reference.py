"""The specification: plain torch, one tensor at a time. Every other backend is tested against this one.

Arithmetic runs in fp32 for bf16 and fp16 weights and in the weights' own dtype otherwise; a weight is rounded once,
when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import (
    DRAWS,
    INVERSE,
    LOW_PRECISION,
    MASK,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    SUM,
    UPDATE_NORM,
    XX,
    XY,
    YY,
    Backend,
    Group,
    Lists,
    Table,
    arithmetic_dtype,
    finish_norm,
)
from .rng import chosen, round_at_random, stream_key


def wide(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x.dtype))


def weight_scale(w: Tensor, group: Group) -> Tensor | float:
    """T_w = |w| + eta for ASAM (arXiv 2102.11600), 1 for SAM."""
    return wide(w).abs() + group.eta if group.adaptive else 1.0


def before(table: Table, i: int) -> Tensor:
    """The unperturbed weight of row i."""
    return table.backups[i] if table.backups else table.weights[i]


def gradient_factor(h: Group, status: Tensor, grad_scale: Tensor | None) -> float:
    """What an update multiplies its gradient by: the loss scale undone, then the clipping, then the sign."""
    factor = 1.0 if grad_scale is None else 1 / float(grad_scale)
    if h.max_norm < math.inf:
        factor *= min(1.0, h.max_norm / (float(status[UPDATE_NORM]) * factor + 1e-6))
    return -factor if h.maximize else factor


def stream(table: Table, i: int, status: Tensor, purpose: int) -> tuple[int, int]:
    return stream_key(table.seed, int(status[DRAWS]), table.streams[i], purpose)


def put(table: Table, i: int, x: Tensor, status: Tensor, purpose: int) -> None:
    """x into what the network computes with."""
    to = table.models[i] if table.models else table.weights[i]
    stochastic = table.stochastic and to.dtype in LOW_PRECISION
    to.copy_(round_at_random(x, stream(table, i, status, purpose), to.dtype) if stochastic else x)


def put_updated(table: Table, i: int, x: Tensor, status: Tensor) -> None:
    if table.models:
        table.weights[i].copy_(x)
    put(table, i, x, status, ROUND_UPDATED)


class Reference(Backend):
    name = "reference"

    @classmethod
    def missing(cls) -> str | None:
        return None

    def serves(self, device: torch.device, weight: torch.dtype, gradient: torch.dtype) -> bool:
        return True

    def norm(
        self,
        table: Table,
        groups: Sequence[Group],
        status: Tensor,
        *,
        scaled: bool,
        carry: bool,
        begin: bool,
        finish: bool,
        eps: float,
    ) -> None:
        if begin:
            status[SUM] = 0
        for w, g, k in zip(table.weights, table.gradients, table.groups, strict=True):
            x = weight_scale(w, groups[k]) * wide(g) if scaled else g
            status[SUM] += x.to(status.dtype).square().sum()
        if finish:
            finish_norm(status, scaled=scaled, carry=carry, eps=eps)

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        """w + e, e = rho T_w^2 g / (||T_w g|| + eps): arXiv 2010.01412 eq. 2, arXiv 2102.11600."""
        for w, b in zip(table.weights, table.backups, strict=False):
            b.copy_(w)
        if status[SKIP]:
            return
        for i, k in enumerate(table.groups):
            w, h = wide(table.weights[i]), groups[k]
            e = float(h.rho * status[INVERSE] / h.share) * (weight_scale(w, h) ** 2 * wide(table.gradients[i]))
            moved = w + e
            if h.share < 1:
                moved = torch.where(chosen(stream(table, i, status, MASK), e, h.share), moved, w)
            put(table, i, moved, status, ROUND_PERTURBED)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        """torch.optim.SGD's step, operation by operation as its for-loop does it, from the backup."""
        if status[SKIP]:
            self.restore(table)
            return
        for i, k in enumerate(table.groups):
            h, m = groups[k], table.momenta[i]
            w = wide(before(table, i))
            d = wide(table.gradients[i]) * gradient_factor(h, status, grad_scale)
            if h.weight_decay != 0:
                d = d.add(w, alpha=h.weight_decay)
            if h.momentum != 0 and m is not None:
                moved = (m * h.momentum).add(d, alpha=1 - h.dampening)
                if h.dampening != 0:
                    moved = torch.where((m == 0) & m.signbit(), d, moved) + 0.0
                m.copy_(moved)
                d = d.add(m, alpha=h.momentum) if h.nesterov else m
            put_updated(table, i, w.add(d, alpha=-float(h.lr)), status)

    def adam(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        """torch.optim.Adam's and AdamW's step (arXiv 1412.6980 algorithm 1, arXiv 1711.05101 algorithm 2)."""
        if status[SKIP]:
            self.restore(table)
            return
        for i, k in enumerate(table.groups):
            h, m, v = groups[k], table.momenta[i], table.squares[i]
            assert m is not None
            table.steps[i] += 1
            t, lr = float(table.steps[i]), float(h.lr)
            w = wide(before(table, i))
            d = wide(table.gradients[i]) * gradient_factor(h, status, grad_scale)
            if h.decoupled:
                w = w * (1 - lr * h.weight_decay)
            elif h.weight_decay != 0:
                d = d.add(w, alpha=h.weight_decay)
            m.lerp_(d, 1 - h.beta1)
            v.mul_(h.beta2).addcmul_(d, d, value=1 - h.beta2)
            s = v
            if h.amsgrad:
                s = table.largest[i]  # type: ignore[assignment]
                torch.maximum(s, v, out=s)
            denominator = s.sqrt() / math.sqrt(1 - h.beta2**t) + h.adam_eps
            put_updated(table, i, w.addcdiv(m, denominator, value=-lr / (1 - h.beta1**t)), status)

    def restore(self, table: Table) -> None:
        for to, kept in zip(table.models or table.weights, table.backups or table.weights, strict=True):
            to.copy_(kept)

    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        if begin:
            sums[: YY + 1] = 0
        for x, y in zip(lists.x, lists.y, strict=True):
            x, y = x.to(sums.dtype), y.to(sums.dtype)
            sums[XY] += (x * y).sum()
            sums[XX] += (x * x).sum()
            sums[YY] += (y * y).sum()

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor, status: Tensor | None = None) -> None:
        if status is not None and status[SKIP]:
            return
        a, b = coefficients[:2].tolist()
        for x, y, o in zip(lists.x, lists.y, out, strict=True):
            first = a * wide(x) if a != 0 else torch.zeros_like(wide(x))
            second = b * wide(y) if b != 0 else torch.zeros_like(wide(y))
            o.copy_(first + second)

    def average(self, lists: Lists, decay: float, status: Tensor | None = None) -> None:
        if status is not None and status[SKIP]:
            return
        for x, y in zip(lists.x, lists.y, strict=True):
            x.copy_(decay * wide(x) + (1 - decay) * wide(y))
