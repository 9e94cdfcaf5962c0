"""Two vectors over all parameters, such as a kept gradient and a new one, for the primitives P4 to P6.

A vector is a list with one tensor for each of the plan's parameters, or None where it has none; a row counts where both
vectors have a tensor. Rows are sorted by dtypes and agreement once, and kept by the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import YY, Backend, Lists, status_dtype

from .layout import is_alike
from .plan import Plan

Vector = Sequence[Tensor | None]


@dataclass(eq=False)
class Rows:
    """Rows of equal dtypes, the backend that runs them, and their share in a global sum (see sharding.py)."""

    backend: Backend
    numbers: list[int]
    share: float
    native: Any = None  # whatever the backend keeps for them


class Pair:
    """Two vectors side by side, x and y. Rows whose layouts disagree take the reference backend."""

    def __init__(self, plan: Plan, x: Vector, y: Vector) -> None:
        self._plan = plan
        key = tuple(
            None
            if a is None or b is None or not a.numel()
            else (a.dtype, b.dtype, flat and is_alike(p, a) and is_alike(p, b))
            for a, b, p, flat in zip(x, y, plan.params, plan.flat, strict=True)
        )
        rows = plan.pairs.get(key)
        if rows is None:
            rows = plan.pairs[key] = self._sorted(key)
        self._rows = [
            (r, Lists([x[i] for i in r.numbers], [y[i] for i in r.numbers], r.native))  # type: ignore[misc]
            for r in rows
        ]

    def _sorted(self, key: tuple[tuple[torch.dtype, torch.dtype, bool] | None, ...]) -> list[Rows]:
        buckets: dict[tuple[tuple[torch.dtype, torch.dtype, bool], float], list[int]] = {}
        for i, kind in enumerate(key):
            if kind is not None:
                share = 1.0 if self._plan.sharding is None else self._plan.sharding.shares[i]
                buckets.setdefault((kind, share), []).append(i)
        return [
            Rows(self._plan.backend if kind[2] else self._plan.slow, numbers, share)
            for (kind, share), numbers in buckets.items()
        ]

    def _each(self) -> Iterator[tuple[Rows, Lists]]:
        for rows, lists in self._rows:
            yield rows, lists
            rows.native = lists.native

    def dots(self) -> Tensor:
        """<x, y>, ||x||^2, ||y||^2 over all parameters (of all processes): 3 numbers on the device (P4)."""
        device = self._plan.params[0].device
        total = torch.zeros(YY + 1, dtype=status_dtype(device), device=device)
        if self._plan.sharding is None:
            for i, (rows, lists) in enumerate(self._each()):
                rows.backend.dots(lists, total, begin=i == 0)
            return total
        part = torch.zeros_like(total)
        for rows, lists in self._each():
            rows.backend.dots(lists, part, begin=True)
            total += part * rows.share
        self._plan.sharding.add_up(total)
        return total

    def _number(self, c: Tensor | float) -> Tensor:
        """c as a coefficient on the device: filled in there, because a copy from the host cannot be in a CUDA graph."""
        device = self._plan.params[0].device
        if isinstance(c, Tensor):
            return c.to(device, status_dtype(device)).reshape(())
        return torch.full((), c, dtype=status_dtype(device), device=device)

    def combine(self, out: Vector, a: Tensor | float, b: Tensor | float, status: Tensor | None = None) -> None:
        """out = a * x + b * y (P5); `out` may be x or y. With a status, nothing is written where it says to skip.

        Where `out` has neither's dtype it takes two passes.
        """
        numbers = [self._number(a), self._number(b)]
        coefficients = torch.stack(numbers)
        for rows, lists in self._each():
            to: list[Tensor] = [out[i] for i in rows.numbers]  # type: ignore[misc]
            if to[0].dtype in (lists.x[0].dtype, lists.y[0].dtype):
                rows.backend.combine(lists, to, coefficients, status)
                continue
            for keep, column, c in ((0.0, lists.x, numbers[0]), (1.0, lists.y, numbers[1])):
                rows.backend.combine(Lists(to, column), to, torch.stack([torch.full_like(c, keep), c]), status)

    def average(self, decay: float, status: Tensor | None = None) -> None:
        """x = decay * x + (1 - decay) * y (P6). With a status, nothing is written where it says to skip."""
        for rows, lists in self._each():
            rows.backend.average(lists, decay, status)


def state_vector(
    plan: Plan, state: dict[Tensor, dict[str, object]], name: str, like: Vector, *, begin: bool
) -> list[Tensor | None]:
    """The state of that name for each parameter that has a tensor in `like`, None elsewhere.

    begin: where a parameter has none, make zeros in the arithmetic's dtype and keep them in the state; else leave it
        out.
    """
    return [None if g is None else plan.state_part(state, i, name, begin=begin) for i, g in enumerate(like)]
