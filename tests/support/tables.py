"""Tables with random contents for one backend, and equal tables for `reference`, which is the oracle.

Both backends use the same dtypes and start from the same bits. Their results differ only by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fused_sam.backends import BACKENDS
from fused_sam.backends.contract import Backend, LionGroup, PerturbGroup, Table
from fused_sam.backends.reference import grad_factor
from fused_sam.testing.tables import (
    BF16,
    CPU,
    F16,
    F32,
    F64,
    KINDS,
    MASTERS,
    PERTURB_GROUPS,
    PLAIN,
    RULE_OF,
    SEED,
    SHAPES,
    SIZES,
    STOCHASTIC,
    Group,
    Kind,
    Twins,
    addressed,
    columns,
    difference,
    draw_state,
    draw_table,
    status_with,
)
from support.bits import same_bits

from .backends import Variant

__all__ = [
    "BF16", "CPU", "F16", "F32", "F64", "KINDS", "MASTERS", "PERTURB_GROUPS", "PLAIN", "RULE_OF", "SEED", "SHAPES",
    "SIZES", "STOCHASTIC", "Group", "Kind", "Pair", "addressed", "assert_near", "assert_unchanged", "backend_for",
    "columns", "draw_state", "draw_table", "primary", "status_with",
]  # fmt: skip


def backend_for(variant: Variant, kind: Kind) -> Backend:
    """Return the variant's backend; skip the test if it has no kernels for such dtypes."""
    backend = BACKENDS[variant.name]()
    if variant.name == "reference":
        pytest.skip("the oracle itself")
    if not backend.supports(CPU, kind.param, kind.grad):
        pytest.skip(f"{variant} has no kernels for {kind}")
    return backend


def primary(table: Table) -> list[Tensor]:
    """Return the masters, or the params where there are none."""
    return table.masters or table.params


class Pair(Twins):
    """Twins for a variant of a backend, whose contents a test may replace."""

    def __init__(
        self,
        variant: Variant,
        kind: Kind,
        groups: Sequence[Group],
        shapes: Sequence[Sequence[int]] = SHAPES,
        *,
        perturb_groups: Sequence[PerturbGroup] = PERTURB_GROUPS,
        perturbed: bool = True,
    ) -> None:
        backend = backend_for(variant, kind)
        super().__init__(backend, kind, groups, shapes, perturb_groups=perturb_groups, perturbed=perturbed)

    def replace(self, column: str, tensors: Sequence[Tensor]) -> None:
        """Fill a column's tensors with these numbers, in both tables."""
        for table in (self.table, self.twin):
            for to, x in zip(getattr(table, column), tensors, strict=True):
                to.copy_(x)

    def replace_primary(self, tensors: Sequence[Tensor]) -> None:
        """Fill the masters, or the params where there are none, with these numbers."""
        self.replace("masters" if self.kind.masters else "params", tensors)

    def update(self, grad_scale: float | None = None, max_norm: float = math.inf) -> None:
        assert self.table.rule is not None
        if self.table.rule.name == "lion" and not self.twin_status.skip:
            self._check_signs(None if grad_scale is None else torch.tensor(grad_scale), max_norm)
        super().update(grad_scale, max_norm)

    def _check_signs(self, grad_scale: Tensor | None, max_norm: float) -> None:
        """Check that rounding cannot change a sign in Lion: the arguments of sign() are 0 or not near 0."""
        for m, g, k in zip(self.twin.state["exp_avg"], self.twin.grads, self.twin.group_ids, strict=True):
            h = self.groups[k]
            assert m is not None and isinstance(h, LionGroup)
            d = g.double() * grad_factor(h.maximize, self.twin_status, grad_scale, max_norm)
            terms = h.beta1 * m.double(), (1 - h.beta1) * d
            size = terms[0].abs() + terms[1].abs()
            assert ((sum(terms).abs() > 1e-6 * size) | (size == 0)).all()  # type: ignore[union-attr]

    def compare(self) -> None:
        """Compare the backend's table with reference's."""
        assert not (found := self.difference()), found


def assert_unchanged(now: Sequence[Tensor | None], before: Sequence[Tensor | None], what: str) -> None:
    """Check that no bit of a column has changed."""
    for i, (a, b) in enumerate(zip(now, before, strict=True)):
        if a is not None and b is not None:
            assert same_bits(a, b), f"{what}[{i}] has changed: {a} was {b}"


def assert_near(found: Tensor, wanted: Tensor, what: str) -> None:
    """Check that two tensors are equal within rounding, see `difference`."""
    assert not (message := difference(found, wanted, what)), message
