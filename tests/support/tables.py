"""Tables with random contents for one backend, and equal tables for `reference`, which is the oracle.

Both backends use the same dtypes and start from the same bits. Their results differ only by rounding.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_sam.backends import BACKENDS
from fused_sam.backends.contract import (
    ASCENT_NORM,
    INVERSE_NORM,
    RNG_OFFSET,
    RULES,
    UPDATE_NORM,
    AdamGroup,
    Backend,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    UpdateRule,
    arithmetic_dtype,
)
from fused_sam.backends.reference import Reference, grad_factor
from support.bits import same_bits
from support.draws import values

from .backends import Variant

CPU = torch.device("cpu")
SIZES = (1, 7, 33, 1025, 16385)  # around a vector, a tile and a chunk of the kernels
SHAPES = tuple((n,) for n in SIZES)
SEED = 0xF123456789ABCDEF  # all 64 bits count

Group = SGDGroup | AdamGroup | LionGroup
RULE_OF: dict[type, UpdateRule] = {rule.group: rule for rule in RULES}

PERTURB_GROUPS = [
    PerturbGroup(0.5),
    PerturbGroup(0.8, True, 0.1),
    PerturbGroup(0.3),
    PerturbGroup(0.0, True),
]


@dataclass(frozen=True)
class Kind:
    """The dtypes of a table's columns, and how its params are rounded."""

    param: torch.dtype
    grad: torch.dtype
    masters: bool = False
    stochastic: bool = False

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.param, self.grad)]
        return "-".join(names) + ("-masters" if self.masters else "") + ("-stochastic" if self.stochastic else "")

    @property
    def primary(self) -> torch.dtype:
        """The dtype of the masters, or of the params where there are none."""
        return torch.float32 if self.masters else self.param


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PLAIN = [Kind(F32, F32), Kind(F64, F64), Kind(BF16, BF16), Kind(F16, F16), Kind(BF16, F32), Kind(F16, F32)]
MASTERS = [Kind(p, g, masters=True) for p, g in ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))]
STOCHASTIC = [Kind(p, g, stochastic=True) for p, g in ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))]
KINDS = PLAIN + MASTERS + STOCHASTIC


def backend_for(variant: Variant, kind: Kind) -> Backend:
    """Return the variant's backend; skip the test if it has no kernels for such dtypes."""
    backend = BACKENDS[variant.name]()
    if variant.name == "reference":
        pytest.skip("the oracle itself")
    if not backend.supports(CPU, kind.param, kind.grad):
        pytest.skip(f"{variant} has no kernels for {kind}")
    return backend


def addressed(tensors: Sequence[Tensor]) -> array[int]:
    """Return the addresses of the tensors as a table holds them."""
    return array("q", [t.data_ptr() for t in tensors])


def status_with(numbers: dict[int, float]) -> Status:
    """Return a status on the CPU with these numbers by place, and 0 elsewhere."""
    status = Status(CPU)
    for place, number in numbers.items():
        status.values[place] = number
    return status


def primary(table: Table) -> list[Tensor]:
    """Return the masters, or the params where there are none."""
    return table.masters or table.params


def columns(table: Table) -> dict[str, list[Tensor | None]]:
    """Return every column that primitives write, by name."""
    return {"params": [*table.params], "backups": [*table.backups], "masters": [*table.masters], **table.state}


def draw_state(group: Group, name: str, x: Tensor) -> Tensor | None:
    """Return state like that of an earlier step, made of the random numbers x, or None if the group has none.

    The first half of a moving average has its initial value.
    """
    if name == "momentum_buffer" and isinstance(group, SGDGroup) and group.momentum == 0:
        return None
    if name == "max_exp_avg_sq" and isinstance(group, AdamGroup) and not group.amsgrad:
        return None
    if name.endswith("_sq"):
        return x.square()
    x.view(-1)[: x.numel() // 2] = -0.0 if name == "momentum_buffer" else 0.0
    return x


def draw_table(
    kind: Kind, groups: Sequence[Group], shapes: Sequence[Sequence[int]], *, perturbed: bool, seed: int = 0
) -> Table:
    """Return a table whose row i belongs to group i % len(groups). Equal arguments give equal bits."""
    ids = [i % len(groups) for i in range(len(shapes))]
    rule = RULE_OF[type(groups[0])]

    def column(number: int, dtype: torch.dtype) -> list[Tensor]:
        return [values(s, seed + 1000 * number + i, dtype) for i, s in enumerate(shapes)]

    weights, grads = column(0, kind.primary), column(1, kind.grad)
    state: dict[str, list[Tensor | None]] = {}
    for number, (name, _, scalar) in enumerate(rule.columns, 2):
        if scalar:
            state[name] = [torch.tensor(float(3 * i)) for i in range(len(shapes))]
        else:
            drawn = column(number, arithmetic_dtype(kind.param))
            state[name] = [draw_state(groups[k], name, x) for k, x in zip(ids, drawn, strict=True)]
    backups = [torch.full_like(w, 7.0) for w in weights] if perturbed else [*weights]
    return Table(
        [torch.full_like(w, 7.0, dtype=kind.param) for w in weights] if kind.masters else weights,
        ids,
        kind.grad,
        backups=[] if kind.masters else backups,
        masters=weights if kind.masters else [],
        rule=rule,
        state=state,
        stochastic_rounding=kind.stochastic,
        seed=SEED,
        rng_streams=[(0x7FFFFFFF - 12345 * i) for i in range(len(shapes))],
        grads=grads,
        grad_addresses=addressed(grads),
    )


class Pair:
    """A backend's table and reference's, each with its status. A primitive runs on both.

    Args:
        groups: the groups of the update. Their type is that of the update rule.
        perturb_groups: the groups of `norm` and `perturb`.
        perturbed: False if the params are their own backups.
    """

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
        self.backend, self.reference = backend_for(variant, kind), Reference()
        self.kind, self.groups, self.perturb_groups = kind, list(groups), list(perturb_groups)[: len(groups)]
        self.table, self.twin = (draw_table(kind, groups, shapes, perturbed=perturbed) for _ in range(2))
        # Numbers that fp32 holds, for backends that narrow the status to it.
        numbers = {ASCENT_NORM: 8.0, INVERSE_NORM: 0.125, UPDATE_NORM: 160.0, RNG_OFFSET: 7.0}
        self.status, self.twin_status = status_with(numbers), status_with(numbers)

    def set_status(self, numbers: dict[int, float]) -> None:
        for status in (self.status, self.twin_status):
            for place, number in numbers.items():
                status.values[place] = number

    def replace(self, column: str, tensors: Sequence[Tensor]) -> None:
        """Fill a column's tensors with these numbers, in both tables."""
        for table in (self.table, self.twin):
            for to, x in zip(getattr(table, column), tensors, strict=True):
                to.copy_(x)

    def replace_primary(self, tensors: Sequence[Tensor]) -> None:
        """Fill the masters, or the params where there are none, with these numbers."""
        self.replace("masters" if self.kind.masters else "params", tensors)

    def norm(self, *, ascent: bool, keep_skip: bool = False, eps: float = 0.0) -> None:
        groups = self.perturb_groups if ascent else None
        self.backend.norm([self.table], groups, self.status, keep_skip=keep_skip, eps=eps)
        self.reference.norm([self.twin], groups, self.twin_status, keep_skip=keep_skip, eps=eps)

    def perturb(self) -> None:
        self.backend.perturb(self.table, self.perturb_groups, self.status)
        self.reference.perturb(self.twin, self.perturb_groups, self.twin_status)

    def update(self, grad_scale: float | None = None, max_norm: float = math.inf) -> None:
        """Run the update of the groups' rule."""
        assert self.table.rule is not None
        rule = self.table.rule.name
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        if rule == "lion" and not self.twin_status.skip:
            self._check_signs(scale, max_norm)
        self.backend.update(self.table, self.groups, self.status, scale, max_norm)
        self.reference.update(self.twin, self.groups, self.twin_status, scale, max_norm)

    def restore(self) -> None:
        self.backend.restore(self.table)
        self.reference.restore(self.twin)

    def _check_signs(self, grad_scale: Tensor | None, max_norm: float) -> None:
        """Check that rounding cannot change a sign in Lion: the arguments of sign() are 0 or not near 0."""
        for m, g, k in zip(self.twin.state["exp_avg"], self.twin.grads, self.twin.group_ids, strict=True):
            h = self.groups[k]
            assert m is not None and isinstance(h, LionGroup)
            d = g.double() * grad_factor(h.maximize, self.twin_status, grad_scale, max_norm)
            terms = h.beta1 * m.double(), (1 - h.beta1) * d
            size = terms[0].abs() + terms[1].abs()
            assert ((sum(terms).abs() > 1e-6 * size) | (size == 0)).all()  # type: ignore[union-attr]

    def copies(self) -> dict[str, list[Tensor | None]]:
        """Return copies of the columns of the backend's table."""
        return {name: [None if t is None else t.clone() for t in c] for name, c in columns(self.table).items()}

    def compare(self) -> None:
        """Compare the backend's table with reference's."""
        wanted = columns(self.twin)
        for name, column in columns(self.table).items():
            for i, (a, b) in enumerate(zip(column, wanted[name], strict=True)):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    assert_near(a, b, f"{name}[{i}]")


def assert_unchanged(now: Sequence[Tensor | None], before: Sequence[Tensor | None], what: str) -> None:
    """Check that no bit of a column has changed."""
    for i, (a, b) in enumerate(zip(now, before, strict=True)):
        if a is not None and b is not None:
            assert same_bits(a, b), f"{what}[{i}] has changed: {a} was {b}"


def assert_near(found: Tensor, wanted: Tensor, what: str) -> None:
    """Check that two tensors are equal within rounding.

    The limit is 32 ulp of the largest number in the tensor, because a formula has a few terms, each rounded once or
    twice. bf16 and fp16 are rounded from fp32 numbers that may differ by as much. If such a difference crosses a
    rounding boundary, the result moves by one place of the storage type. Fewer than one of 2^8 elements may do so.
    """
    assert found.shape == wanted.shape and found.dtype is wanted.dtype and found.stride() == wanted.stride(), what
    error = (found.double() - wanted.double()).abs()
    limit = 32 * torch.finfo(arithmetic_dtype(found.dtype)).eps * max(1.0, float(wanted.abs().max()))
    beyond = ~(error <= limit)
    if found.dtype in (BF16, F16):
        differing = int(beyond.sum())
        assert differing <= 2 + found.numel() / 256, f"{what}: {differing} of {found.numel()} elements differ"
        beyond &= (_places(found) - _places(wanted)).abs() > 1
    assert not beyond.any(), (
        f"{what} of shape {tuple(found.shape)}: {found[beyond][:5]} should be {wanted[beyond][:5]}, within {limit:.3g}"
    )


def _places(x: Tensor) -> Tensor:
    """Return each number's place among all numbers of its type; 0 and -0 have one place."""
    bits = x.contiguous().view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
