"""Tables with random contents for one backend, and equal tables for `reference`, which is the oracle.

Both use the same dtypes and start from the same bits. Their results differ only by rounding.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from fused_sam.backends.reference import Reference

CPU = torch.device("cpu")
SIZES = (1, 7, 33, 1025, 16385)  # around a vector, a tile and a chunk of the kernels
SHAPES = tuple((n,) for n in SIZES)
SEED = 0xF123456789ABCDEF  # all 64 bits count

Group = Any  # of an update rule
RULE_OF: dict[type, UpdateRule] = {rule.group: rule for rule in RULES}

PERTURB_GROUPS = [
    PerturbGroup(0.5),
    PerturbGroup(0.8, True, 0.1),
    PerturbGroup(0.3),
    PerturbGroup(0.0, True),
]

# Groups of each update rule, which cover all of its options.
GROUPS: dict[str, Sequence[Any]] = {
    "sgd": [
        SGDGroup(0.1),
        SGDGroup(0.2, momentum=0.9, weight_decay=0.03),
        SGDGroup(0.05, momentum=0.8, dampening=0.3, maximize=True),
        SGDGroup(0.3, momentum=0.7, nesterov=True, weight_decay=0.01),
    ],
    # The eps is far above rounding. With 1e-8, rounding of a gradient near 0 would decide the sign of an element.
    "adam": [
        AdamGroup(0.1, 0.8, 0.95, eps=1e-3, weight_decay=0.05),
        AdamGroup(0.2, 0.9, 0.99, eps=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        AdamGroup(0.05, 0.0, 0.9, eps=1e-3, maximize=True, amsgrad=True),
        AdamGroup(0.3, 0.7, 0.8, eps=1e-1, decoupled_weight_decay=True, amsgrad=True),
    ],
    # The betas are 0 and on both sides of 0.5, where the moving average changes its formula.
    "lion": [
        LionGroup(0.1, weight_decay=0.05),
        LionGroup(0.2, 0.7, 0.3),
        LionGroup(0.05, 0.0, 0.6, maximize=True),
        LionGroup(0.3, 0.3, 0.0, weight_decay=0.2),
    ],
}


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


def values(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers, the same for every dtype except for the rounding to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def addressed(tensors: Sequence[Tensor]) -> array[int]:
    """Return the addresses of the tensors as a table holds them."""
    return array("q", [t.data_ptr() for t in tensors])


def status_with(numbers: dict[int, float], device: torch.device = CPU) -> Status:
    """Return a status with these numbers by place, and 0 elsewhere."""
    status = Status(device)
    for place, number in numbers.items():
        status.values[place] = number
    return status


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
    kind: Kind,
    groups: Sequence[Group],
    shapes: Sequence[Sequence[int]],
    *,
    perturbed: bool,
    seed: int = 0,
    device: torch.device = CPU,
) -> Table:
    """Return a table whose row i belongs to group i % len(groups). Equal arguments give equal bits."""
    ids = [i % len(groups) for i in range(len(shapes))]
    rule = RULE_OF[type(groups[0])]

    def column(number: int, dtype: torch.dtype) -> list[Tensor]:
        return [values(s, seed + 1000 * number + i, dtype).to(device) for i, s in enumerate(shapes)]

    weights, grads = column(0, kind.primary), column(1, kind.grad)
    state: dict[str, list[Tensor | None]] = {}
    for number, (name, _, scalar) in enumerate(rule.columns, 2):
        if scalar:
            state[name] = [torch.tensor(float(3 * i), device=device) for i in range(len(shapes))]
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


class Twins:
    """A backend's table and reference's, each with its status. A primitive runs on both.

    Args:
        groups: the groups of the update. Their type is that of the update rule.
        perturb_groups: the groups of `norm` and `perturb`.
        perturbed: False if the params are their own backups.
    """

    def __init__(
        self,
        backend: Backend,
        kind: Kind,
        groups: Sequence[Group],
        shapes: Sequence[Sequence[int]] = SHAPES,
        *,
        perturb_groups: Sequence[PerturbGroup] = PERTURB_GROUPS,
        perturbed: bool = True,
        device: torch.device = CPU,
    ) -> None:
        self.backend, self.reference = backend, Reference()
        self.kind, self.groups, self.perturb_groups = kind, list(groups), list(perturb_groups)[: len(groups)]
        self.table, self.twin = (
            draw_table(kind, groups, shapes, perturbed=perturbed, device=device) for _ in range(2)
        )
        # Numbers that fp32 holds, for backends that narrow the status to it.
        numbers = {ASCENT_NORM: 8.0, INVERSE_NORM: 0.125, UPDATE_NORM: 160.0, RNG_OFFSET: 7.0}
        self.status, self.twin_status = status_with(numbers, device), status_with(numbers, device)
        self.device = device

    def set_status(self, numbers: dict[int, float]) -> None:
        for status in (self.status, self.twin_status):
            for place, number in numbers.items():
                status.values[place] = number

    def norm(self, *, ascent: bool, keep_skip: bool = False, eps: float = 0.0) -> None:
        groups = self.perturb_groups if ascent else None
        self.backend.norm([self.table], groups, self.status, keep_skip=keep_skip, eps=eps)
        self.reference.norm([self.twin], groups, self.twin_status, keep_skip=keep_skip, eps=eps)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return the backend's and reference's sums of squares of gradients and params: fp64, shape (2, tensors)."""
        sums = [torch.zeros(2, len(self.table.params), dtype=s.values.dtype, device=self.device)
                for s in (self.status, self.twin_status)]  # fmt: skip
        self.backend.squares(self.table, self.perturb_groups, sums[0], weights=True)
        self.reference.squares(self.twin, self.perturb_groups, sums[1], weights=True)
        return sums[0].double(), sums[1].double()

    def perturb(self) -> None:
        self.backend.perturb(self.table, self.perturb_groups, self.status)
        self.reference.perturb(self.twin, self.perturb_groups, self.twin_status)

    def update(self, grad_scale: float | None = None, max_norm: float = math.inf) -> None:
        """Run the update of the groups' rule."""
        scale = None if grad_scale is None else torch.tensor(grad_scale, device=self.device)
        self.backend.update(self.table, self.groups, self.status, scale, max_norm)
        self.reference.update(self.twin, self.groups, self.twin_status, scale, max_norm)

    def restore(self) -> None:
        self.backend.restore(self.table)
        self.reference.restore(self.twin)

    def copies(self) -> dict[str, list[Tensor | None]]:
        """Return copies of the columns of the backend's table."""
        return {name: [None if t is None else t.clone() for t in c] for name, c in columns(self.table).items()}

    def difference(self) -> str:
        """Return how the backend's table differs from reference's by more than rounding; an empty string if not."""
        wanted = columns(self.twin)
        for name, column in columns(self.table).items():
            for i, (a, b) in enumerate(zip(column, wanted[name], strict=True)):
                if (a is None) != (b is None):
                    return f"{name}[{i}] is {a}, and should be {b}"
                if a is not None and b is not None and (found := difference(a, b, f"{name}[{i}]")):
                    return found
        return ""


def difference(found: Tensor, wanted: Tensor, what: str, ulps: int = 32) -> str:
    """Return how two tensors differ by more than rounding; an empty string if they do not.

    The limit is 32 ulp of the largest number in the tensor, because a formula has a few terms, each rounded once or
    twice. bf16 and fp16 are rounded from fp32 numbers that may differ by as much. If such a difference crosses a
    rounding boundary, the result moves by one place of the storage type. Fewer than one of 2^8 elements may do so.
    """
    if found.shape != wanted.shape or found.dtype is not wanted.dtype or found.stride() != wanted.stride():
        return f"{what} is {found.dtype} {tuple(found.shape)}, and should be {wanted.dtype} {tuple(wanted.shape)}"
    if not found.numel():
        return ""
    error = (found.double() - wanted.double()).abs()
    limit = ulps * torch.finfo(arithmetic_dtype(found.dtype)).eps * max(1.0, float(wanted.abs().max()))
    beyond = ~(error <= limit)
    if found.dtype in (BF16, F16):
        differing = int(beyond.sum())
        if differing > 2 + found.numel() / 256:
            return f"{what}: {differing} of {found.numel()} elements differ"
        beyond &= (_places(found) - _places(wanted)).abs() > 1
    if beyond.any():
        some = f"{found[beyond][:5].tolist()} should be {wanted[beyond][:5].tolist()}"
        return f"{what} of shape {tuple(found.shape)}: {some}, within {limit:.3g}"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have equal shapes, dtypes and bits. -0.0 differs from 0.0; equal NaNs are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def _places(x: Tensor) -> Tensor:
    """Return each number's place among all numbers of its type; 0 and -0 have one place."""
    bits = x.contiguous().view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
