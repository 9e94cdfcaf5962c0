"""Tables and vectors with random contents for the Triton kernels, and copies of them for the reference."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sam.backends.contract import (
    LION,
    RULES,
    AdamGroup,
    Backend,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    UpdateRule,
    VectorPair,
)
from fused_sam.backends.reference import Reference, grad_factor
from support.draws import values

# Around the paths of a block: multiples of 16 and not, a block filled, one element more, several blocks.
SIZES = [1, 15, 16, 17, 48, 511, 512, 513, 1024, 1030]

DTYPES = [  # param, gradient
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]

PERTURB_GROUPS = [
    PerturbGroup(0.05),
    PerturbGroup(0.5, adaptive=True, eta=0.1),
    PerturbGroup(0.3),
    PerturbGroup(0.2, adaptive=True),
]

Group = SGDGroup | AdamGroup | LionGroup
RULE_OF: dict[type, UpdateRule] = {rule.group: rule for rule in RULES}

# Groups for each update rule, with all of its options.
GROUPS: dict[str, Sequence[Group]] = {
    "sgd": [
        SGDGroup(0.1, momentum=0.9, weight_decay=0.01),
        SGDGroup(0.2, momentum=0.8, dampening=0.3, weight_decay=0.02),
        SGDGroup(0.05, momentum=0.9, nesterov=True, maximize=True),
        SGDGroup(0.3),
    ],
    "adam": [
        AdamGroup(0.01, weight_decay=0.1, decoupled_weight_decay=True, eps=1e-3),
        AdamGroup(0.02, 0.7, 0.95, weight_decay=0.03, amsgrad=True, eps=1e-2),
        AdamGroup(0.05, 0.0, 0.5, maximize=True, eps=1e-3),
        AdamGroup(0.03, amsgrad=True, decoupled_weight_decay=True, eps=1e-3),
    ],
    "lion": [
        LionGroup(0.01, weight_decay=0.1),
        LionGroup(0.02, 0.7, 0.3, maximize=True),
        LionGroup(0.05, 0.0, 0.6),
        LionGroup(0.03, 0.3, 0.0, weight_decay=0.2),
    ],
}


def place(x: Tensor, shift: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the same numbers, `shift` elements past an aligned address."""
    room = torch.empty(x.numel() + shift, dtype=x.dtype, device=device)[shift:]
    return room.copy_(x)


@dataclass
class Case:
    """A table, its groups and a status, and the same for the reference. A primitive runs on both."""

    table: Table
    twin: Table
    groups: Sequence[Group]
    perturb_groups: Sequence[PerturbGroup]
    status: Status
    twin_status: Status

    def attach(self, grads: Sequence[Tensor]) -> None:
        """Let the table read gradients at these addresses; the twin gets copies."""
        self.table.grads = list(grads)
        self.table.grad_addresses = array("q", [g.data_ptr() for g in grads])
        self.twin.grads = [g.clone() for g in grads]

    def set_status(self, place: int, number: float) -> None:
        self.status.values[place] = self.twin_status.values[place] = number

    def sides(self, backend: Backend) -> list[tuple[Backend, Table, Status]]:
        return [(backend, self.table, self.status), (Reference(), self.twin, self.twin_status)]

    def norm(self, backend: Backend, *, ascent: bool, keep_skip: bool = False) -> None:
        for b, table, status in self.sides(backend):
            b.norm([table], self.perturb_groups if ascent else None, status, keep_skip=keep_skip, eps=1e-12)

    def perturb(self, backend: Backend) -> None:
        for b, table, status in self.sides(backend):
            b.perturb(table, self.perturb_groups, status)

    def update(self, backend: Backend, grad_scale: Tensor | None = None, max_norm: float = math.inf) -> None:
        """Run the update of the table's rule."""
        undecided = self._undecided_signs(grad_scale, max_norm)
        for b, table, status in self.sides(backend):
            assert table.rule is not None
            b.update(table, self.groups, status, grad_scale, max_norm)
        for i, mask in enumerate(undecided):
            assert int(mask.sum()) <= 2 + mask.numel() // 10_000
            for column, twin in ((self.table.params, self.twin.params), (self.table.masters, self.twin.masters)):
                if column:
                    twin[i][mask] = column[i][mask]

    def _undecided_signs(self, grad_scale: Tensor | None, max_norm: float) -> list[Tensor]:
        """Return masks of the elements where rounding may decide the sign that Lion takes; no masks for other rules."""
        masks = []
        if self.twin.rule is LION:
            for m, g, k in zip(self.twin.state["exp_avg"], self.twin.grads, self.twin.group_ids, strict=True):
                h = self.groups[k]
                assert m is not None and isinstance(h, LionGroup)
                d = g.double() * grad_factor(h.maximize, self.twin_status, grad_scale, max_norm)
                x, y = h.beta1 * m.double(), (1 - h.beta1) * d
                masks.append((x + y).abs() < 1e-6 * (x.abs() + y.abs()))
        return masks

    def compare(self, *names: str) -> None:
        """Compare the columns of these names with the reference's; without names, all that primitives write."""
        found, wanted = columns(self.table), columns(self.twin)
        for name in names or found:
            assert_near(found[name], wanted[name], name)


def columns(table: Table) -> dict[str, list[Tensor | None]]:
    """Return every column that primitives write, by name."""
    return {"params": [*table.params], "backups": [*table.backups], "masters": [*table.masters], **table.state}


def draw_case(
    sizes: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    groups: Sequence[Group] = GROUPS["sgd"],
    *,
    perturb_groups: Sequence[PerturbGroup] = PERTURB_GROUPS,
    shift: int = 0,
    perturbed: bool = True,
    device: torch.device | str = "cpu",
    masters: bool = False,
    stochastic: bool = False,
) -> Case:
    """Return a case over `sizes`. Row i is of group i modulo their number, and its state is that after i steps.

    Every second momentum buffer is new.

    Args:
        dtypes: of params and gradients.
        groups: of the update, which decide the rule.
        shift: how many elements past an aligned address the tensors begin.
        perturbed: False if the params are their own backups.
    """
    device = torch.device(device)
    ids = [i % len(groups) for i in range(len(sizes))]
    drawn = [[values((n,), 10 * i + c).to(torch.float32) for i, n in enumerate(sizes)] for c in range(3)]
    rule = RULE_OF[type(groups[0])]

    def state_of(name: str, i: int) -> Tensor | None:
        group, x = groups[ids[i]], drawn[2][i]
        if name == "step":
            return torch.tensor(float(i), device=device)
        if isinstance(group, SGDGroup):
            x = x if i % 2 else torch.full_like(x, -0.0)
            return place(x, shift, device) if group.momentum else None
        if name == "exp_avg_sq":
            x = drawn[1][i].square()
        if name == "max_exp_avg_sq":
            assert isinstance(group, AdamGroup)
            if not group.amsgrad:
                return None
            x = drawn[1][i].square() * 1.5
        return place(x, shift, device)

    def table() -> Table:
        weights = [place(x if masters else x.to(dtypes[0]), shift, device) for x in drawn[0]]
        sevens = [place(torch.full_like(x, 7.0).to(dtypes[0]), shift, device) for x in drawn[0]]
        return Table(
            sevens if masters else weights,
            ids,
            dtypes[1],
            backups=[] if masters else sevens if perturbed else [*weights],
            masters=weights if masters else [],
            rule=rule,
            state={column.name: [state_of(column.name, i) for i in range(len(sizes))] for column in rule.columns},
            stochastic_rounding=stochastic,
            seed=-3 & (2**64 - 1),
            rng_streams=[5 + 1000 * i for i in range(len(sizes))],
        )

    case = Case(table(), table(), groups, perturb_groups, Status(device), Status(device))
    case.attach([place(x.to(dtypes[1]), shift, device) for x in drawn[1]])
    return case


def draw_pairs(
    sizes: Sequence[int], x: torch.dtype, y: torch.dtype, *, shift: int = 0
) -> tuple[VectorPair, VectorPair]:
    """Return a pair of vectors, and a copy for the reference."""
    drawn = [[values((n,), 20 * i + c).to(dtype) for i, n in enumerate(sizes)] for c, dtype in enumerate((x, y))]
    ours, twin = (VectorPair(*([place(t, shift) for t in column] for column in drawn)) for _ in range(2))
    return ours, twin


def assert_near(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], what: str) -> None:
    """Allow the rounding of fp32 sums, or one unit of the last place of bf16 and fp16, to which they are rounded."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, 4e-6)
        torch.testing.assert_close(a, b, rtol=rtol, atol=4e-6, msg=lambda m, i=i: f"{what} {i}: {m}")
