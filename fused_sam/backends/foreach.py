"""The primitives in torch._foreach_* calls: for devices that no kernel of ours serves.

One batch of calls a parameter group. It needs temporaries the size of the gradients and, on an accelerator, waits for
the norm once a pass; the compiled backends do neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = arithmetic_dtype(tensors[0].dtype)
    return [t if t.dtype is dtype else t.to(dtype) for t in tensors]


@dataclass
class Rows:
    """The rows of one parameter group."""

    table: Table
    group: Group
    numbers: list[int]

    def of(self, column: Sequence[Tensor | None]) -> list[Tensor]:
        return [column[i] for i in self.numbers]  # type: ignore[misc]

    def key(self, row: int, draw: int, purpose: int) -> tuple[int, int]:
        return stream_key(self.table.seed, draw, self.table.streams[self.numbers[row]], purpose)

    def publish(self, numbers: list[Tensor], draw: int, purpose: int) -> None:
        """Round numbers of the arithmetic's dtype into what the network computes with."""
        to = self.of(self.table.models or self.table.weights)
        if self.table.stochastic and to[0].dtype in LOW_PRECISION:
            numbers = [round_at_random(x, self.key(r, draw, purpose), to[r].dtype) for r, x in enumerate(numbers)]
        torch._foreach_copy_(to, numbers)


def by_group(table: Table, groups: Sequence[Group]) -> list[Rows]:
    return [
        Rows(table, groups[k], [i for i, group in enumerate(table.groups) if group == k])
        for k in dict.fromkeys(table.groups)
    ]


class Foreach(Backend):
    name = "foreach"

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
        for rows in by_group(table, groups):
            gradients = wide(rows.of(table.gradients))
            if scaled and rows.group.adaptive:
                scale = weight_scale(wide(rows.of(table.weights)), rows.group)
                torch._foreach_mul_(scale, gradients)
                gradients = scale
            wider = torch.promote_types(gradients[0].dtype, status.dtype)  # squares of 1e19 leave fp32's range
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=wider))
            status[SUM] += norms.to(status.dtype).square().sum()
        if finish:
            finish_norm(status, scaled=scaled, carry=carry, eps=eps)

    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        if table.backups:
            torch._foreach_copy_(table.backups, table.weights)
        inverse, skip, draw = status[[INVERSE, SKIP, DRAWS]].tolist()
        if skip:
            return
        for rows in by_group(table, groups):
            h = rows.group
            weights, e = rows.of(table.weights), wide(rows.of(table.gradients))
            moved = wide(weights)
            if h.adaptive:
                scale = weight_scale(moved, h)
                torch._foreach_mul_(scale, scale)
                torch._foreach_mul_(scale, e)
                e = scale
            step = h.rho * inverse / h.share
            if h.share < 1:
                e = list(torch._foreach_add(moved, e, alpha=step))
                keys = [rows.key(r, int(draw), MASK) for r in range(len(e))]
                triples = zip(keys, moved, e, strict=True)
                moved = [torch.where(chosen(key, w, h.share), x, w) for key, w, x in triples]
            elif table.models:
                moved = list(torch._foreach_add(moved, e, alpha=step))
            else:
                torch._foreach_add_(moved, e, alpha=step)
            if moved[0] is not weights[0]:  # else it was worked on in place
                rows.publish(moved, int(draw), ROUND_PERTURBED)

    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        def change(rows: Rows, weights: list[Tensor], d: list[Tensor]) -> None:
            h = rows.group
            if h.weight_decay != 0:
                d = list(torch._foreach_add(d, weights, alpha=h.weight_decay))
            if h.momentum != 0 and table.momenta[rows.numbers[0]] is not None:
                momenta = rows.of(table.momenta)
                begins = [(m == 0) & m.signbit() for m in momenta] if h.dampening != 0 else []
                torch._foreach_mul_(momenta, h.momentum)
                torch._foreach_add_(momenta, d, alpha=1 - h.dampening)
                for m, gradient, new in zip(momenta, d, begins, strict=False):
                    m.copy_(torch.where(new, gradient, m) + 0.0)
                d = list(torch._foreach_add(d, momenta, alpha=h.momentum)) if h.nesterov else momenta
            torch._foreach_add_(weights, d, alpha=-float(h.lr))

        self._update(table, groups, status, grad_scale, change)

    def adam(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        def change(rows: Rows, weights: list[Tensor], d: list[Tensor]) -> None:
            h, lr = rows.group, float(rows.group.lr)
            if h.decoupled:
                torch._foreach_mul_(weights, 1 - lr * h.weight_decay)
            elif h.weight_decay != 0:
                d = list(torch._foreach_add(d, weights, alpha=h.weight_decay))
            means, squares, steps = rows.of(table.momenta), rows.of(table.squares), rows.of(table.steps)
            torch._foreach_lerp_(means, d, 1 - h.beta1)
            torch._foreach_mul_(squares, h.beta2)
            torch._foreach_addcmul_(squares, d, d, 1 - h.beta2)
            if h.amsgrad:
                largest = rows.of(table.largest)
                torch._foreach_maximum_(largest, squares)
                squares = largest
            torch._foreach_add_(steps, 1)
            counts = torch.stack(steps).tolist()
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, [math.sqrt(1 - h.beta2**t) for t in counts])
            torch._foreach_add_(roots, h.adam_eps)
            torch._foreach_addcdiv_(weights, means, roots, [-lr / (1 - h.beta1**t) for t in counts])

        self._update(table, groups, status, grad_scale, change)

    def _update(
        self,
        table: Table,
        groups: Sequence[Group],
        status: Tensor,
        grad_scale: Tensor | None,
        change: Callable[[Rows, list[Tensor], list[Tensor]], None],
    ) -> None:
        """Undo, and let `change` move each group's weights in place, by gradients unscaled, clipped and signed."""
        norm, skip, draw = status[[UPDATE_NORM, SKIP, DRAWS]].tolist()
        if skip:
            self.restore(table)
            return
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        for rows in by_group(table, groups):
            h, weights = rows.group, rows.of(table.weights)
            if table.backups:
                torch._foreach_copy_(weights, rows.of(table.backups))
            factor = -unscale if h.maximize else unscale
            if h.max_norm < math.inf:
                factor *= min(1.0, h.max_norm / (norm * unscale + 1e-6))
            wider, d = wide(weights), wide(rows.of(table.gradients))
            change(rows, wider, d if factor == 1 else list(torch._foreach_mul(d, factor)))
            if table.models or wider[0] is not weights[0]:  # else it was worked on in place
                rows.publish(wider, int(draw), ROUND_UPDATED)

    def restore(self, table: Table) -> None:
        torch._foreach_copy_(table.models or table.weights, table.backups or table.weights)

    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        if begin:
            sums[: YY + 1] = 0
        x, y = wide(lists.x), wide(lists.y)
        sums[XY] += torch.stack([p.sum(dtype=sums.dtype) for p in torch._foreach_mul(x, y)]).sum()
        for place, column in ((XX, x), (YY, y)):
            sums[place] += torch.stack(torch._foreach_norm(column, 2)).to(sums.dtype).square().sum()

    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor, status: Tensor | None = None) -> None:
        if status is not None and status[SKIP]:
            return
        a, b = coefficients[:2].tolist()
        terms = [torch._foreach_mul(wide(column), c) for column, c in ((lists.x, a), (lists.y, b)) if c != 0]
        if not terms:
            torch._foreach_zero_(out)
            return
        torch._foreach_copy_(out, torch._foreach_add(*terms) if len(terms) == 2 else terms[0])

    def average(self, lists: Lists, decay: float, status: Tensor | None = None) -> None:
        if status is not None and status[SKIP]:
            return
        x, y = wide(lists.x), wide(lists.y)
        torch._foreach_mul_(x, decay)
        torch._foreach_add_(x, y, alpha=1 - decay)
        if x[0] is not lists.x[0]:
            torch._foreach_copy_(lists.x, x)


def weight_scale(weights: list[Tensor], group: Group) -> list[Tensor]:
    """|w| + eta, in new tensors."""
    scale = torch._foreach_abs(weights)
    torch._foreach_add_(scale, group.eta)
    return list(scale)
