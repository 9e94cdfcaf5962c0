"""The specification: plain torch, one tensor at a time. Every other backend is tested against this one.

Arithmetic runs in fp32 for bf16 and fp16 parameters and in the parameters' own dtype otherwise. A parameter is rounded
once, when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import (
    LOW_PRECISION,
    MASK,
    PERTURBED,
    ROUND_PERTURBED,
    ROUND_UPDATED,
    UPDATED,
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
from .rng import mask_of, round_stochastically, stream_key

State = dict[str, Tensor]  # of one parameter


def widen(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic."""
    return x.to(arithmetic_dtype(x.dtype))


def weight_scale(table: Table, i: int, group: PerturbGroup) -> Tensor | float:
    """Return T_w of row i: 1 for SAM, |w| + eta for ASAM (arXiv 2102.11600).

    For Precond-SAM (arXiv 2502.02407) (sqrt(v_hat) + eps)^(-1/2), v_hat being Adam's second moment without its bias.
    """
    if table.unbias is not None:
        return (table.second_moments[i].sqrt() * table.unbias[i] + group.eta).rsqrt()
    return widen((table.masters or table.params)[i]).abs() + group.eta if group.adaptive else 1.0


def grad_factor(maximize: bool, status: Status, grad_scale: Tensor | None, max_norm: float) -> float:
    """Return what an update multiplies its gradients by: unscaling, then clipping, then the sign."""
    factor = 1.0 if grad_scale is None else 1 / float(grad_scale)
    if max_norm < math.inf:
        factor *= min(1.0, max_norm / (float(status.update_norm) * factor + 1e-6))
    return -factor if maximize else factor


def unperturbed(table: Table, i: int) -> Tensor:
    """Return the parameter of row i as it was before the perturbation."""
    return (table.masters or table.backups or table.params)[i]


def key_of(table: Table, i: int, status: Status, purpose: int) -> tuple[int, int]:
    """Return the key of row i's random numbers."""
    return stream_key(table.seed, int(status.rng_offset), table.rng_streams[i], purpose)


def rounded(table: Table, i: int, x: Tensor, status: Status, purpose: int) -> Tensor:
    """Return x as it is to be copied into the parameter of row i."""
    dtype = table.params[i].dtype
    if table.stochastic_rounding and dtype in LOW_PRECISION:
        return round_stochastically(x, key_of(table, i, status, purpose), dtype)
    return x


def write_pending(table: Table, status: Status) -> None:
    """Write the values that an update has computed. If an exception ends it, it may be called again."""
    for tensor, value in table.pending:
        tensor.copy_(value)
    status.marks[UPDATED] += 1
    table.pending = []


def write_vector(out: list[Tensor], new: list[Tensor], status: Status | None) -> None:
    """Copy new values into a vector, and count that as one write; `status.pending` has them until it is counted."""
    if status is not None:
        status.pending = status.marks[UPDATED], out, new
    torch._foreach_copy_(out, new)
    if status is not None:
        status.marks[UPDATED] += 1
        status.pending = None


# ---- a step of each update rule: changes a copy of the state; param w, gradient d and group h give the new param ----


def sgd(state: State, w: Tensor, d: Tensor, h: SGDGroup) -> Tensor:
    """torch.optim.SGD's step, operation by operation as its for-loop does it."""
    m = state.get("momentum_buffer")
    if h.weight_decay != 0:
        d = d.add(w, alpha=h.weight_decay)
    if h.momentum != 0 and m is not None:
        new = (m * h.momentum).add(d, alpha=1 - h.dampening)
        if h.dampening != 0:
            new = torch.where((m == 0) & m.signbit(), d, new) + 0.0
        m.copy_(new)
        d = d.add(m, alpha=h.momentum) if h.nesterov else m
    return w.add(d, alpha=-float(h.lr))


def adam(state: State, w: Tensor, d: Tensor, h: AdamGroup) -> Tensor:
    """torch.optim.Adam's and AdamW's step (arXiv 1412.6980 algorithm 1, arXiv 1711.05101 algorithm 2)."""
    m, v, count = state["exp_avg"], state["exp_avg_sq"], state["step"]
    count += 1
    t, lr = float(count), float(h.lr)
    if h.decoupled_weight_decay:
        w = w * (1 - lr * h.weight_decay)
    elif h.weight_decay != 0:
        d = d.add(w, alpha=h.weight_decay)
    m.lerp_(d, 1 - h.beta1)
    v.mul_(h.beta2).addcmul_(d, d, value=1 - h.beta2)
    if h.amsgrad:
        largest = state["max_exp_avg_sq"]
        v = torch.maximum(largest, v, out=largest)
    denominator = v.sqrt() / math.sqrt(1 - h.beta2**t) + h.eps
    return w.addcdiv(m, denominator, value=-lr / (1 - h.beta1**t))


def lion(state: State, w: Tensor, d: Tensor, h: LionGroup) -> Tensor:
    """Lion's step (Chen et al., arXiv 2302.06675, algorithm 2)."""
    m, lr = state["exp_avg"], float(h.lr)
    c = m.lerp(d, 1 - h.beta1)
    direction = torch.where(c.isnan(), c, c.sign())  # torch's sign of NaN is 0, which would hide it
    m.lerp_(d, 1 - h.beta2)
    return (w * (1 - lr * h.weight_decay)).add(direction, alpha=-lr)


STEPS: dict[str, Callable[[State, Tensor, Tensor, Any], Tensor]] = {"sgd": sgd, "adam": adam, "lion": lion}


# ---- the primitives -------------------------------------------------------------------------------------------------


class Reference(Backend):
    """Plain torch, for any device and any dense layout."""

    name = "reference"

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        return True

    @torch.no_grad()
    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        for i, (g, k) in enumerate(zip(table.grads, table.group_ids, strict=True)):
            x = g if groups is None else weight_scale(table, i, groups[k]) * widen(g)
            status.sum_of_squares.add_(x.to(status.values.dtype).square().sum())

    @torch.no_grad()
    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        for i, (g, k) in enumerate(zip(table.grads, table.group_ids, strict=True)):
            x = weight_scale(table, i, groups[k]) * widen(g)
            sums[0, i] = x.to(sums.dtype).square().sum()
            if weights:
                sums[1, i] = (table.masters or table.params)[i].to(sums.dtype).square().sum()

    @torch.no_grad()
    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        """w + e, e = rho T_w^2 g / (||T_w g|| + eps): arXiv 2010.01412 equation 2, arXiv 2102.11600."""
        for backup, param in zip(table.backups, table.params, strict=False):
            backup.copy_(param)
        status.marks[PERTURBED] += 1
        if status.skip:
            return
        for i, k in enumerate(table.group_ids):
            w, h = widen((table.masters or table.params)[i]), groups[k]
            length = float(h.rho * status.inverse_norm / h.mask_prob)
            if table.factors is not None:
                length *= float(table.factors[i])
            perturbed = w + length * (weight_scale(table, i, h) ** 2 * widen(table.grads[i]))
            if h.mask_prob < 1:
                perturbed = torch.where(mask_of(key_of(table, i, status, MASK), w, h.mask_prob), perturbed, w)
            table.params[i].copy_(rounded(table, i, perturbed, status, ROUND_PERTURBED))

    @torch.no_grad()
    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        """Undo the perturbation and take the step: all new values first, so that nothing is written if one fails."""
        if status.skip:
            self.restore(table)
        elif not table.pending:
            assert table.rule is not None
            step, new = STEPS[table.rule.name], []
            for i, k in enumerate(table.group_ids):
                held = {name: x for name, column in table.state.items() if (x := column[i]) is not None}
                state = {name: x.clone() for name, x in held.items()}
                d = widen(table.grads[i]) * grad_factor(groups[k].maximize, status, grad_scale, max_norm)
                w = step(state, widen(unperturbed(table, i)), d, groups[k])
                new += [(held[name], x) for name, x in state.items()]
                if table.masters:
                    new.append((table.masters[i], w))
                new.append((table.params[i], rounded(table, i, w, status, ROUND_UPDATED)))
            table.pending = new
        write_pending(table, status)

    @torch.no_grad()
    def restore(self, table: Table) -> None:
        for param, clean in zip(table.params, table.masters or table.backups or table.params, strict=True):
            param.copy_(clean)

    @torch.no_grad()
    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        if reset:
            sums[: YY + 1] = 0
        for x, y in zip(pair.x, pair.y, strict=True):
            x, y = x.to(sums.dtype), y.to(sums.dtype)
            sums[XY] += (x * y).sum()
            sums[XX] += (x * x).sum()
            sums[YY] += (y * y).sum()

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
        new = []
        for x, y in zip(pair.x, pair.y, strict=True):
            first = a * widen(x) if a != 0 else torch.zeros_like(widen(x))
            second = b * widen(y) if b != 0 else torch.zeros_like(widen(y))
            new.append(first + second)
        write_vector(out, new, status)

    @torch.no_grad()
    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        if status is not None and status.skip:
            return
        new = [decay * widen(x) + (1 - decay) * widen(y) for x, y in zip(pair.x, pair.y, strict=True)]
        write_vector(pair.x, new, status)


def host_numbers(coefficients: Tensor | tuple[float, float]) -> tuple[float, float]:
    """Return a and b as Python numbers; waits for the device where they are a tensor."""
    numbers: Any = coefficients[:2].tolist() if isinstance(coefficients, Tensor) else coefficients
    return float(numbers[0]), float(numbers[1])
