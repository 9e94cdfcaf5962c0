"""The specification: plain torch, one tensor at a time. Every other backend is tested against this one.

Arithmetic runs in fp32 for bf16 and fp16 weights and in the weights' own dtype otherwise; a weight is rounded once,
when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import (
    INVERSE,
    NORM,
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
)


def wide(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x.dtype))


def weight_scale(w: Tensor, group: Group) -> Tensor | float:
    """T_w = |w| + eta for ASAM (arXiv 2102.11600, section 3), 1 for SAM."""
    return wide(w).abs() + group.eta if group.adaptive else 1.0


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
        """w + e, e = rho T_w^2 g / (||T_w g|| + eps): arXiv 2010.01412 eq. 2, arXiv 2102.11600 eq. 5."""
        for w, b in zip(table.weights, table.backups, strict=True):
            b.copy_(w)
        if status[SKIP]:
            return
        for w, b, g, k in zip(table.weights, table.backups, table.gradients, table.groups, strict=True):
            step = float(groups[k].rho * status[INVERSE])
            e = step * (weight_scale(b, groups[k]) ** 2 * wide(g))
            w.copy_(wide(b) + e)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        """torch.optim.SGD's step, operation by operation as its for-loop does it, from the backup."""
        if status[SKIP]:
            self.restore(table)
            return
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        for i, k in enumerate(table.groups):
            h, m = groups[k], table.momenta[i]
            w, d = wide(table.backups[i]), wide(table.gradients[i])
            d = d * (-unscale if h.maximize else unscale)
            if h.weight_decay != 0:
                d = d.add(w, alpha=h.weight_decay)
            if h.momentum != 0 and m is not None:
                moved = (m * h.momentum).add(d, alpha=1 - h.dampening)
                if h.dampening != 0:
                    moved = torch.where((m == 0) & m.signbit(), d, moved) + 0.0
                m.copy_(moved)
                d = d.add(m, alpha=h.momentum) if h.nesterov else m
            table.weights[i].copy_(w.add(d, alpha=-float(h.lr)))

    def restore(self, table: Table) -> None:
        for w, b in zip(table.weights, table.backups, strict=True):
            w.copy_(b)


    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        if begin:
            sums[: YY + 1] = 0
        for x, y in zip(lists.x, lists.y, strict=True):
            x, y = x.to(sums.dtype), y.to(sums.dtype)
            sums[XY] += (x * y).sum()
            sums[XX] += (x * x).sum()
            sums[YY] += (y * y).sum()

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor) -> None:
        a, b = coefficients[:2].tolist()
        for x, y, o in zip(lists.x, lists.y, out, strict=True):
            first = a * wide(x) if a != 0 else torch.zeros_like(wide(x))
            second = b * wide(y) if b != 0 else torch.zeros_like(wide(y))
            o.copy_(first + second)

    def average(self, lists: Lists, decay: float) -> None:
        for x, y in zip(lists.x, lists.y, strict=True):
            x.copy_(decay * wide(x) + (1 - decay) * wide(y))


def finish_norm(status: Tensor, *, scaled: bool, carry: bool, eps: float) -> None:
    """From SUM to NORM, INVERSE and SKIP, as `Backend.norm` describes them."""
    norm = status[SUM].sqrt()
    bad = ~status[SUM].isfinite()
    if scaled:
        inverse = 1 / (norm + eps)
        usable = (inverse <= 1e30) & ~bad  # a zero gradient gives no direction to follow
        status[NORM] = norm
        status[INVERSE] = torch.where(usable, inverse, torch.zeros_like(inverse))
    else:
        status[UPDATE_NORM] = norm
    status[SKIP] = (bad | (status[SKIP] != 0)) if carry else bad
