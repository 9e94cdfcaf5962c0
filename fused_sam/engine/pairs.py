"""Primitives over two vectors of all parameters, such as the two gradients of a step.

A vector is a list with one tensor, or None, per parameter of the plan. A row counts where both vectors have a tensor.
Rows are sorted by dtype and layout once, and the plan keeps the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import UPDATED, YY, Backend, Status, VectorPair, status_dtype

from .layout import same_layout
from .plan import Plan, remember

Vector = Sequence[Tensor | None]
Number = Tensor | float


@dataclass(eq=False)
class Rows:
    """Rows of equal dtypes, the backend that runs them, and their fraction in a global sum (see sharding.py)."""

    backend: Backend
    numbers: list[int]
    fraction: float
    native: Any = None  # the backend's own form for these rows


def pairs_of(plan: Plan, x: Vector, y: Vector, out: Vector | None = None) -> Iterator[tuple[Rows, VectorPair]]:
    """Yield the rows of two vectors, by dtype and layout. Rows that no kernel can take go to the reference backend.

    Args:
        out: a third vector that the rows will be written to; it has a tensor where both others have one.
    """
    key: Any = tuple(
        None
        if a is None or b is None or not a.numel()
        else (
            a.dtype,
            b.dtype,
            # What a kernel can take, written out because this runs for each parameter.
            dense
            and same_layout(p, a)
            and same_layout(p, b)
            and a.data_ptr() != 0 != b.data_ptr()
            and not (a.is_neg() or b.is_neg()),
        )
        for a, b, p, dense in zip(x, y, plan.local_params, plan.dense, strict=True)
    )
    if out is not None:
        key = tuple(
            None if kind is None else (*kind[:2], kind[2] and _fits(p, o), o.dtype)  # type: ignore[arg-type, union-attr]
            for kind, p, o in zip(key, plan.local_params, out, strict=True)
        )
    rows = plan.pairs.get(key)
    if rows is None:
        rows = _sorted_rows(plan, key)
        remember(plan.pairs, key, rows)
    for row in rows:
        pair = VectorPair([x[i] for i in row.numbers], [y[i] for i in row.numbers], row.native)  # type: ignore[misc]
        yield row, pair
        row.native = pair.native


def _fits(p: Tensor, out: Tensor) -> bool:
    """Return True if a kernel can write the tensor as it writes a parameter of this layout."""
    return same_layout(p, out) and out.data_ptr() != 0 and not out.is_neg()


def _sorted_rows(plan: Plan, key: tuple[tuple[Any, ...] | None, ...]) -> list[Rows]:
    buckets: dict[tuple[tuple[Any, ...], float], list[int]] = {}
    for i, kind in enumerate(key):
        if kind is not None:
            fraction = 1.0 if plan.sharding is None else plan.sharding.fractions[i]
            buckets.setdefault((kind, fraction), []).append(i)
    return [
        Rows(plan.backend if kind[2] else plan.fallback, numbers, fraction)
        for (kind, fraction), numbers in buckets.items()
    ]


def device_of(plan: Plan) -> torch.device:
    """Return the device of the plan's parameters; the CPU if there are none."""
    return plan.local_params[0].device if plan.local_params else torch.device("cpu")


def dot(plan: Plan, x: Vector, y: Vector) -> Tensor:
    """Return <x, y>, ||x||^2 and ||y||^2 over all parameters of all processes: shape (3,), on the device."""
    device = device_of(plan)
    total = torch.zeros(YY + 1, dtype=status_dtype(device), device=device)
    if plan.sharding is None:
        for i, (row, pair) in enumerate(pairs_of(plan, x, y)):
            row.backend.dot(pair, total, reset=i == 0)
        return total
    part = torch.zeros_like(total)
    for row, pair in pairs_of(plan, x, y):
        row.backend.dot(pair, part, reset=True)
        total += part * row.fraction
    plan.sharding.all_reduce(total)
    return total


def axpby(
    plan: Plan, x: Vector, y: Vector, out: Vector, a: Number, b: Number, status: Status | None = None
) -> None:
    """Write out = a * x + b * y where all three have a tensor; `out` may be x or y.

    Args:
        a, b: numbers, or 0-dim tensors, which are not waited for.
        status: if given, nothing is written where skip is set, and the write is counted: a hook that an exception has
            ended runs again without the writes that it has made.
    """
    third = out is not x and out is not y
    if third:
        x = [None if o is None else t for t, o in zip(x, out, strict=True)]
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        device = device_of(plan)
        numbers = [as_scalar(a, device), as_scalar(b, device)]
        coefficients: Any = torch.stack(numbers)
    else:
        coefficients = numbers = (float(a), float(b))  # type: ignore[assignment]
    for row, pair in pairs_of(plan, x, y, out if third else None):
        if status is not None and _is_done(plan, status):
            continue
        to: list[Tensor] = [out[i] for i in row.numbers]  # type: ignore[misc]
        if to[0].dtype in (pair.x[0].dtype, pair.y[0].dtype):
            row.backend.axpby(pair, to, coefficients, status)
            continue
        # A third dtype takes two passes, of which the second one alone writes `out`, and is counted.
        part = [torch.empty_like(t) for t in to]
        row.backend.axpby(VectorPair(part, pair.x), part, _after(0.0, numbers[0]))
        row.backend.axpby(VectorPair(part, pair.y), to, _after(1.0, numbers[1]), status)


def _after(kept: float, c: Number) -> Any:
    """Return the coefficients `kept` and c, on the device if c is there."""
    return torch.stack([torch.full_like(c, kept), c]) if isinstance(c, Tensor) else (kept, c)


def ema(plan: Plan, x: Vector, y: Vector, decay: float, status: Status | None = None) -> None:
    """Write x = decay * x + (1 - decay) * y; with a status, nothing where skip is set."""
    for row, pair in pairs_of(plan, x, y):
        if status is None or not _is_done(plan, status):
            row.backend.ema(pair, decay, status)


def _is_done(plan: Plan, status: Status) -> bool:
    """Count a write of the `updated` hook, and return True if an earlier run of the hook has made it."""
    plan.writes += 1
    status.marks[UPDATED] = max(status.marks[UPDATED], plan.writes - 1)
    if status.marks[UPDATED] < plan.writes and status.pending is not None:
        before, out, new = status.pending
        if before == status.marks[UPDATED]:
            torch._foreach_copy_(out, new)
            status.marks[UPDATED] += 1
    return status.marks[UPDATED] >= plan.writes


def as_scalar(c: Number, device: torch.device) -> Tensor:
    """Return c as a 0-dim tensor on the device, filled there: a copy from the host cannot be in a CUDA graph."""
    if isinstance(c, Tensor):
        return c.to(device, status_dtype(device)).reshape(())
    return torch.full((), c, dtype=status_dtype(device), device=device)
