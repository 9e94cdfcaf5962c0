"""The primitives in torch._foreach_* calls: for devices that no kernel of ours supports.

One batch of calls per parameter group. It needs temporaries of the size of the gradients and, on an accelerator, waits
for the status once per primitive. The compiled backends do neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .contract import (
    INVERSE_NORM,
    LOW_PRECISION,
    MASK,
    PERTURBED,
    RNG_OFFSET,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    SKIP,
    UPDATE_NORM,
    XX,
    XY,
    YY,
    AdamGroup,
    Backend,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    VectorPair,
    arithmetic_dtype,
)
from .reference import host_numbers, write_pending, write_vector
from .rng import mask_of, round_stochastically, stream_key

AnyGroup = TypeVar("AnyGroup")


def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(tensors[0].dtype)
    return [t if t.dtype is dtype else t.to(dtype) for t in tensors]


@dataclass
class Rows(Generic[AnyGroup]):
    """The rows of a table that belong to one parameter group."""

    table: Table
    group: AnyGroup
    numbers: list[int]
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (state, its new value)

    def of(self, column: Sequence[Tensor | None]) -> list[Tensor]:
        """Return these rows of a column in which none of them is None."""
        return [column[i] for i in self.numbers]  # type: ignore[misc]

    def weights(self) -> list[Tensor]:
        """Return the masters, or the params where there are none, in the dtype of the arithmetic."""
        return widen(self.of(self.table.masters or self.table.params))

    def state(self, name: str) -> list[Tensor]:
        """Return a copy of these rows of a column of state, which the update is to change."""
        held = self.of(self.table.state[name])
        copies = [x.clone() for x in held]
        self.new += zip(held, copies, strict=True)
        return copies

    def key(self, row: int, rng_offset: int, purpose: int) -> tuple[int, int]:
        """Return the key of a row's random numbers."""
        return stream_key(self.table.seed, rng_offset, self.table.rng_streams[self.numbers[row]], purpose)

    def rounded(self, numbers: list[Tensor], rng_offset: int, purpose: int) -> list[Tensor]:
        """Return numbers of the arithmetic's dtype as they are to be copied into the params."""
        dtype = self.table.params[0].dtype
        if self.table.stochastic_rounding and dtype in LOW_PRECISION:
            return [
                round_stochastically(x, self.key(r, rng_offset, purpose), dtype) for r, x in enumerate(numbers)
            ]
        return numbers


def by_group(table: Table, groups: Sequence[AnyGroup]) -> list[Rows[AnyGroup]]:
    """Return the table's rows, sorted by parameter group."""
    return [
        Rows(table, groups[k], [i for i, group in enumerate(table.group_ids) if group == k])
        for k in dict.fromkeys(table.group_ids)
    ]


def weight_scale(rows: Rows[PerturbGroup]) -> list[Tensor] | None:
    """Return T_w: |w| + eta, or of the second moments; None for 1."""
    table, eta = rows.table, rows.group.eta
    if table.unbias is not None:
        scale = torch._foreach_sqrt(rows.of(table.second_moments))
        torch._foreach_mul_(scale, table.unbias[rows.numbers].tolist())
        torch._foreach_add_(scale, eta)
        torch._foreach_sqrt_(scale)
        torch._foreach_reciprocal_(scale)
        return list(scale)
    if not rows.group.adaptive:
        return None
    scale = torch._foreach_abs(rows.weights())
    torch._foreach_add_(scale, eta)
    return list(scale)


def scaled_grads(rows: Rows[PerturbGroup], power: int = 1) -> list[Tensor]:
    """Return T_w^power g. Do not write to it."""
    grads = widen(rows.of(rows.table.grads))
    scale = weight_scale(rows)
    if scale is None:
        return grads
    if power == 2:
        torch._foreach_mul_(scale, scale)
    torch._foreach_mul_(scale, grads)
    return scale


# ---- a step of each update rule: from gradients d, in place of the weights of one group ---------------------------


def sgd(rows: Rows[SGDGroup], weights: list[Tensor], d: list[Tensor]) -> None:
    h = rows.group
    if h.weight_decay != 0:
        d = list(torch._foreach_add(d, weights, alpha=h.weight_decay))
    if h.momentum != 0 and rows.table.state["momentum_buffer"][rows.numbers[0]] is not None:
        buffers = rows.state("momentum_buffer")
        unwritten = [(m == 0) & m.signbit() for m in buffers] if h.dampening != 0 else []
        torch._foreach_mul_(buffers, h.momentum)
        torch._foreach_add_(buffers, d, alpha=1 - h.dampening)
        for m, grad, first in zip(buffers, d, unwritten, strict=False):
            m.copy_(torch.where(first, grad, m) + 0.0)
        d = list(torch._foreach_add(d, buffers, alpha=h.momentum)) if h.nesterov else buffers
    torch._foreach_add_(weights, d, alpha=-float(h.lr))


def adam(rows: Rows[AdamGroup], weights: list[Tensor], d: list[Tensor]) -> None:
    h, lr = rows.group, float(rows.group.lr)
    if h.decoupled_weight_decay:
        torch._foreach_mul_(weights, 1 - lr * h.weight_decay)
    elif h.weight_decay != 0:
        d = list(torch._foreach_add(d, weights, alpha=h.weight_decay))
    means, squares, steps = (rows.state(name) for name in ("exp_avg", "exp_avg_sq", "step"))
    torch._foreach_lerp_(means, d, 1 - h.beta1)
    torch._foreach_mul_(squares, h.beta2)
    torch._foreach_addcmul_(squares, d, d, 1 - h.beta2)
    if h.amsgrad:
        largest = rows.state("max_exp_avg_sq")
        torch._foreach_maximum_(largest, squares)
        squares = largest
    torch._foreach_add_(steps, 1)
    counts = torch.stack(steps).tolist()
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [math.sqrt(1 - h.beta2**t) for t in counts])
    torch._foreach_add_(roots, h.eps)
    torch._foreach_addcdiv_(weights, means, roots, [-lr / (1 - h.beta1**t) for t in counts])


def lion(rows: Rows[LionGroup], weights: list[Tensor], d: list[Tensor]) -> None:
    h, lr, means = rows.group, float(rows.group.lr), rows.state("exp_avg")
    mixed = torch._foreach_lerp(means, d, 1 - h.beta1)
    signs = [torch.where(c.isnan(), c, s) for c, s in zip(mixed, torch._foreach_sign(mixed), strict=True)]
    torch._foreach_lerp_(means, d, 1 - h.beta2)
    torch._foreach_mul_(weights, 1 - lr * h.weight_decay)
    torch._foreach_add_(weights, signs, alpha=-lr)


STEPS: dict[str, Callable[[Rows[Any], list[Tensor], list[Tensor]], None]] = {"sgd": sgd, "adam": adam, "lion": lion}


# ---- the primitives -------------------------------------------------------------------------------------------------


class Foreach(Backend):
    """torch._foreach_*, for any device and any dense layout."""

    name = "foreach"

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        return True

    @torch.no_grad()
    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        lists = [widen(table.grads)] if groups is None else map(scaled_grads, by_group(table, groups))
        for grads in lists:
            wider = torch.promote_types(grads[0].dtype, status.values.dtype)  # squares of 1e20 leave fp32's range
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=wider))
            status.sum_of_squares.add_(norms.to(status.values.dtype).square().sum())

    @torch.no_grad()
    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        for rows in by_group(table, groups):
            columns = [scaled_grads(rows), *([rows.weights()] if weights else [])]
            for place, column in enumerate(columns):
                wider = torch.promote_types(column[0].dtype, sums.dtype)
                norms = torch.stack(torch._foreach_norm(column, 2, dtype=wider))
                sums[place, rows.numbers] = norms.to(sums.dtype).square()

    @torch.no_grad()
    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        if table.backups:
            torch._foreach_copy_(table.backups, table.params)
        status.marks[PERTURBED] += 1
        inverse, skip, offset = status.values[[INVERSE_NORM, SKIP, RNG_OFFSET]].tolist()
        if skip:
            return
        for rows in by_group(table, groups):
            h = rows.group
            params, weights, e = rows.of(table.params), rows.weights(), scaled_grads(rows, power=2)
            perturbed, length = weights, h.rho * inverse / h.mask_prob
            if table.factors is not None:
                factors = table.factors[rows.numbers] * length
                e, length = list(torch._foreach_mul(e, factors.tolist())), 1.0
            if table.masters or h.mask_prob < 1:
                perturbed = list(torch._foreach_add(weights, e, alpha=length))
            else:
                torch._foreach_add_(weights, e, alpha=length)
            if h.mask_prob < 1:
                keys = [rows.key(r, int(offset), MASK) for r in range(len(e))]
                triples = zip(keys, weights, perturbed, strict=True)
                perturbed = [torch.where(mask_of(key, w, h.mask_prob), x, w) for key, w, x in triples]
            if perturbed[0] is not params[0]:  # else it was done in place
                torch._foreach_copy_(params, rows.rounded(perturbed, int(offset), ROUND_PERTURBED))

    @torch.no_grad()
    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        """Undo the perturbation and take the step: all new values first, so that nothing is written if one fails."""
        norm, skip, offset = status.values[[UPDATE_NORM, SKIP, RNG_OFFSET]].tolist()
        if skip:
            self.restore(table)
        elif not table.pending:
            table.pending = self._new_values(table, groups, norm, int(offset), grad_scale, max_norm)
        write_pending(table, status)

    def _new_values(
        self,
        table: Table,
        groups: Sequence[Any],
        norm: float,
        rng_offset: int,
        grad_scale: Tensor | None,
        max_norm: float,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return what an update is to write, as (tensor, new value)."""
        assert table.rule is not None
        step = STEPS[table.rule.name]
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        clip = min(1.0, max_norm / (norm * unscale + 1e-6)) if max_norm < math.inf else 1.0
        new: list[tuple[Tensor, Tensor]] = []
        for rows in by_group(table, groups):
            factor = -unscale * clip if rows.group.maximize else unscale * clip
            clean = rows.of(table.masters or table.backups or table.params)
            dtype = arithmetic_dtype(clean[0].dtype)
            weights, d = [x.to(dtype, copy=True) for x in clean], widen(rows.of(table.grads))
            step(rows, weights, d if factor == 1 else list(torch._foreach_mul(d, factor)))
            if table.masters:
                rows.new += zip(rows.of(table.masters), weights, strict=True)
            rows.new += zip(
                rows.of(table.params), rows.rounded(weights, rng_offset, ROUND_UPDATED), strict=True
            )
            new += rows.new
        return new

    @torch.no_grad()
    def restore(self, table: Table) -> None:
        torch._foreach_copy_(table.params, table.masters or table.backups or table.params)

    @torch.no_grad()
    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        if reset:
            sums[: YY + 1] = 0
        x, y = widen(pair.x), widen(pair.y)
        sums[XY] += torch.stack([p.sum(dtype=sums.dtype) for p in torch._foreach_mul(x, y)]).sum()
        for place, column in ((XX, x), (YY, y)):
            sums[place] += torch.stack(torch._foreach_norm(column, 2)).to(sums.dtype).square().sum()

    @torch.no_grad()
    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        if status is not None and status.skip:
            return
        a, b = host_numbers(coefficients)
        terms = [torch._foreach_mul(widen(column), c) for column, c in ((pair.x, a), (pair.y, b)) if c != 0]
        terms = terms or [tuple(torch.zeros_like(x) for x in out)]
        write_vector(out, list(torch._foreach_add(*terms) if len(terms) == 2 else terms[0]), status)

    @torch.no_grad()
    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        if status is not None and status.skip:
            return
        new = torch._foreach_mul(widen(pair.x), decay)
        torch._foreach_add_(new, widen(pair.y), alpha=1 - decay)
        write_vector(pair.x, list(new), status)
