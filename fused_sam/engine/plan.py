"""The plan: which tensors a primitive works on, sorted once into tables and kept until something changes.

Every pass reads the parameters' gradients (`Plan.scan`) and looks up the tables for what it found. New tables are built
when a gradient appears or disappears, a tensor moves, or parameters are added; otherwise only gradient addresses are
new. Tensors whose layouts disagree form tables of their own, which the reference backend runs on whole tensors.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION, Backend, Table
from fused_sam.backends.reference import Reference

from .calls import Job, Scan, Update
from .grad_reader import make_reader
from .layout import begun, fitting, fitting_step, is_alike, is_flat
from .masters import MASTER, Masters
from .parameters import check_parameters, names_of
from .sharding import Sharding, gradient_of, is_sharded, like, local

# What a parameter's gradient is to the plan.
ABSENT, ALIKE, WIDER, DISAGREEING = range(4)

# Tables of as many patterns of present gradients are kept: enough for a few alternating losses or frozen stages.
PATTERNS_KEPT = 16

# Columns of a table, and the names of the optimizer state that they hold.
_NAMES = {
    "momenta": ("momentum_buffer", "exp_avg"),
    "squares": ("exp_avg_sq",),
    "largest": ("max_exp_avg_sq",),
    "steps": ("step",),
}


@dataclass(frozen=True)
class Precision:
    """How bf16 and fp16 weights are kept: SAM's options of these names."""

    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0


class Plan:
    """Tables for the parameters of an optimizer.

    Args:
        groups: the optimizer's param_groups.
        backend: what runs the tables whose tensors agree.
        precision: how bf16 and fp16 weights are kept.

    Raises:
        ValueError: parameters on several devices, or sharing memory.
        TypeError: complex or integer parameters.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], backend: Backend, precision: Precision) -> None:
        self.backend = backend
        self._precision = precision
        self.slow = Reference()
        self.owners: list[Tensor] = [p for group in groups for p in group["params"]]  # what user and state know
        self.params = [local(p) for p in self.owners]  # this process's part of them
        self.group_of = [k for k, group in enumerate(groups) for _ in group["params"]]
        self._group_sizes = [len(group["params"]) for group in groups]
        self._names = names_of(groups)
        spread = any(map(is_sharded, self.owners))
        self.sharding = Sharding(self.owners, self._names) if spread else None
        self.reader = make_reader(self.params)
        self._places = [(p.data_ptr(), p.dtype, p.shape) for p in self.params]
        self.flat = [is_flat(p) for p in self.params]
        self._served = [
            flat and backend.serves(p.device, p.dtype, p.dtype) for p, flat in zip(self.params, self.flat, strict=True)
        ]
        self._all_served = all(self._served) and not spread
        self._all_alike = bytes([ALIKE]) * len(self.params)
        self.nothing: list[Job] = []  # what an update undoes where nothing was perturbed
        self._checked = False  # gradients against weights, shape by shape
        self._backups: dict[int, Tensor] = {}
        self.pairs: dict[Any, Any] = {}  # of vectors.py
        self.masters = Masters(self.owners, self.params, wanted=precision.master_weights)
        self._perturb: dict[Any, list[Job]] = {}
        self._update: dict[Any, Update] = {}
        check_parameters(self.params, self._names, self.flat)

    # ---- what the plan stands on --------------------------------------------------------------------------

    def name(self, i: int) -> str:
        """What errors call parameter i."""
        return self._names[i]

    def holds(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the parameters are still those planned for, where they were."""
        params = [p for group in groups for p in group["params"]]
        return (
            [len(group["params"]) for group in groups] == self._group_sizes
            and all(map(operator.is_, params, self.owners))
            and [(p.data_ptr(), p.dtype, p.shape) for p in map(local, params)] == self._places
        )

    # ---- reading gradients --------------------------------------------------------------------------------

    def scan(self, groups: Sequence[dict[str, Any]]) -> Scan | None:
        """The gradients as they are now; None where `groups` are not what this plan was made for.

        Raises:
            RuntimeError: a sparse gradient.
        """
        members = [group["params"] for group in groups]
        if self._checked and self._all_served and list(map(len, members)) == self._group_sizes:
            # The common case: what p.grad's setter guarantees was checked once, what it does not is read each time.
            try:
                reading = self.reader.read(members)
            except RuntimeError:  # a sparse gradient
                reading = None
            if reading is not None:
                return Scan(reading[0], self._all_alike, array("q", reading[1]))  # type: ignore[arg-type]
        if not self.holds(groups):
            return None
        gradients = [self._gradient(p, i) for i, p in enumerate(self.owners)]
        codes = bytes(self._code(i, g) for i, g in enumerate(gradients))
        self._checked = True
        return Scan(gradients, codes)

    def _gradient(self, p: Tensor, i: int) -> Tensor | None:
        g = gradient_of(p)
        if g is not None and is_sharded(p) and not is_sharded(g):
            raise RuntimeError(
                f"{self.name(i)} is sharded and its gradient {tuple(g.shape)} is not: assign DTensors to p.grad"
            )
        return None if g is None else local(g)

    def _code(self, i: int, g: Tensor | None) -> int:
        if g is None:
            return ABSENT
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(i)} has a sparse gradient, which SAM does not support: "
                "its norm and perturbation are dense (for nn.Embedding, use sparse=False)"
            )
        p = self.params[i]
        if g.shape != p.shape or g.device != p.device:
            raise RuntimeError(
                f"{self.name(i)} is {tuple(p.shape)} on {p.device}, its gradient {tuple(g.shape)} on {g.device}: "
                "zero the gradients and run the backward pass again after moving or reshaping weights"
            )
        if not self.flat[i] or not is_alike(p, g) or not self.backend.serves(p.device, p.dtype, g.dtype):
            return DISAGREEING
        return ALIKE if g.dtype is p.dtype else WIDER

    def scan_of(self, vector: Sequence[Tensor | None]) -> Scan:
        """A scan of another vector than the gradients, such as momentum: one tensor, or None, for each weight."""
        return Scan(list(vector), bytes(self._code(i, v) for i, v in enumerate(vector)))

    # ---- tables -------------------------------------------------------------------------------------------

    def perturbation(
        self, scan: Scan, perturbed: Sequence[bool], state: dict[Tensor, dict[str, Any]]
    ) -> list[Job]:
        """Jobs over all weights that have a gradient and whose group is perturbed."""
        self.follow(state, self.nothing)
        key = (scan.codes, tuple(perturbed))
        jobs = self._perturb.get(key)
        if jobs is None:
            rows = [i for i, code in enumerate(scan.codes) if code and perturbed[self.group_of[i]]]
            jobs = self._jobs(rows, scan.codes, self._save_here)
            _remember(self._perturb, key, jobs)
        return jobs

    def update(
        self,
        scan: Scan,
        perturbed: list[Job],
        needs: tuple[tuple[str, ...], ...],
        state: dict[Tensor, dict[str, Any]],
    ) -> Update:
        """Jobs over all weights that have a gradient, and those that undo `perturbed` where there is none any more.

        `needs`: for each group the names of the state that the update reads and writes.
        """
        self.follow(state, perturbed)
        key = (scan.codes, id(perturbed), needs)
        found = self._update.get(key)
        if found is None or found.perturbed is not perturbed or not found.stands_on(state, self.reader):
            found = self._new_update(scan.codes, perturbed, needs, state)
            _remember(self._update, key, found)
        return found

    def forget_state(self) -> None:
        """Let go of optimizer state that has been replaced."""
        self._update.clear()
        if self.masters.forget():
            self._perturb.clear()

    def follow(self, state: dict[Tensor, dict[str, Any]], perturbed: list[Job]) -> None:
        """Have the masters agree with the state and with their weights, but those that `perturbed` will restore."""
        if self.masters.any_due and sum(len(job.rows) for job in perturbed) < len(self.params):
            undone = {i for job in perturbed for i in job.rows}
            self.masters.follow(state, self._fit, self._perturb.clear, undone)

    def _new_update(
        self,
        codes: bytes,
        perturbed: list[Job],
        needs: tuple[tuple[str, ...], ...],
        state: dict[Tensor, dict[str, Any]],
    ) -> Update:
        every_name = {*itertools.chain(*needs), *([MASTER] if self.masters.any_due else [])}
        update = Update(perturbed, held={name: [] for name in sorted(every_name)})
        saved = {i for job in perturbed for i in job.rows}

        def found(i: int, name: str) -> Tensor:
            """This process's part of the state of that name, begun where there is none."""
            p, owner = self.params[i], self.owners[i]
            entry = state.get(owner, {})
            value = entry.get(name)
            if value is None:
                part = self.masters[i] if name == MASTER else begun(name, p)
                update.new.append((owner, name, part if name == "step" else like(part, owner)))
                return part
            if name == MASTER:
                part = self.masters[i]
            else:
                part = fitting_step(value, p) if name == "step" else self._fit(i, name, value)
            if part is not local(value):
                entry[name] = value = part if name == "step" else like(part, owner)
            update.held[name][-1] = value
            return part

        def state_of(i: int) -> dict[str, Tensor]:
            names = needs[self.group_of[i]]
            if self.owners[i] in state:
                update.entries.append(state[self.owners[i]])
                for column in update.held.values():
                    column.append(None)
            return {name: found(i, name) for name in (*names, MASTER) if name != MASTER or self.masters.due[i]}

        def columns(table: Table, rows: list[int]) -> None:
            if not table.models:
                table.backups = [self._backups[i] if i in saved else self.params[i] for i in rows]
            parts = [state_of(i) for i in rows]
            for column, names in _NAMES.items():
                values = [next((part[n] for n in names if n in part), None) for part in parts]
                if column == "momenta" or any(v is not None for v in values):
                    setattr(table, column, values)

        present = [i for i, code in enumerate(codes) if code]
        update.jobs = self._jobs(present, codes, columns)
        for i in present:
            if not self.params[i].numel():  # torch gives state to empty weights as well, though no table has them
                update.idle_steps += [value for name, value in state_of(i).items() if name == "step"]
        update.restore = self._jobs([i for i in sorted(saved) if not codes[i]], self._own_codes(), self._save_here)
        update.all_entries = list(state.values())
        return update

    def state_part(
        self, state: dict[Tensor, dict[str, Any]], i: int, name: str, *, begin: bool
    ) -> Tensor | None:
        """This process's part of a method's own state of parameter i: in the arithmetic's dtype and the weight's shape.

        begin: where there is none, zeros that enter the state; else None.
        """
        p, owner = self.params[i], self.owners[i]
        value = state.get(owner, {}).get(name)
        if value is None:
            if not begin:
                return None
            part = begun(name, p)
            state[owner][name] = like(part, owner)
            return local(state[owner][name])
        part = self._fit(i, name, value)
        if part is not local(value):
            state[owner][name] = like(part, owner)
        return part

    def _fit(self, i: int, name: str, value: Tensor) -> Tensor:
        """This process's part of a weight's state, spread, shaped and laid out as the weight is.

        Raises:
            RuntimeError: it is of another shape, or whole where the weight is sharded.
        """
        owner, p = self.owners[i], self.params[i]
        if is_sharded(owner) != is_sharded(value):
            raise RuntimeError(
                f"{self.name(i)} and its {name!r} must both be sharded or both be whole: load the state of sharded "
                "weights with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if is_sharded(owner) and (value.placements, value.device_mesh) != (owner.placements, owner.device_mesh):  # type: ignore[attr-defined]
            value = value.redistribute(owner.device_mesh, owner.placements)  # type: ignore[attr-defined]
        if local(value).shape != p.shape:
            raise RuntimeError(
                f"{self.name(i)} has a {name!r} of shape {tuple(value.shape)}: a weight that changes its shape needs "
                "new state, delete optimizer.state[weight]"
            )
        return fitting(local(value), p)

    def inherit(self, old: Plan) -> None:
        """Take over another plan's master weights, where the parameters are the same."""
        self.masters.inherit(old.masters, {id(p): i for i, p in enumerate(self.owners)})
        if self.sharding is not None and old.sharding is not None:
            self.sharding.inherit(old.sharding)

    def adopt(self, old: Plan, perturbed: list[Job]) -> list[Job]:
        """Take over what another plan perturbed: jobs that restore the same weights where they are now.

        Raises:
            RuntimeError: a perturbed weight has left the optimizer or changed its shape.
        """
        index = {id(p): i for i, p in enumerate(self.owners)}
        rows = []
        for j in (row for job in perturbed for row in job.rows):
            i = index.get(id(old.owners[j]))
            kept = old.masters[j] if old.masters.due[j] else old._backups[j]
            if i is None or kept.shape != self.params[i].shape:
                raise RuntimeError(
                    f"{old.name(j)} was perturbed and has been removed or reshaped since: "
                    "call second_step() or restore() before changing weights"
                )
            if self.masters.due[i]:
                self.masters.take(i, kept)
            else:
                self._backups[i] = torch.empty_like(self.params[i], requires_grad=False).copy_(kept)
            rows.append(i)
        self.masters.begin()
        return self._jobs(rows, self._own_codes(), self._save_here)

    def _own_codes(self) -> bytes:
        """Codes for copying between weights and backups, where no gradient matters."""
        return bytes(
            ALIKE if served and (i not in self._backups or is_alike(p, self._backups[i])) else DISAGREEING
            for i, (p, served) in enumerate(zip(self.params, self._served, strict=True))
        )

    def _jobs(self, rows: list[int], codes: bytes, columns: Callable[[Table, list[int]], None]) -> list[Job]:
        """One job for each combination of dtypes and agreement, in a fixed order; empty tensors are left out."""
        buckets: dict[tuple[torch.dtype, int, float], list[int]] = {}
        for i in rows:
            if self.params[i].numel():
                share = 1.0 if self.sharding is None else self.sharding.shares[i]
                buckets.setdefault((self.params[i].dtype, codes[i], share), []).append(i)
        jobs = []
        for (dtype, code, share), chosen in buckets.items():
            agreeing = code != DISAGREEING
            low = dtype in LOW_PRECISION
            mastered = low and self._precision.master_weights
            weights = [self.params[i] for i in chosen]
            table = Table(
                weights=[self.masters[i] for i in chosen] if mastered else weights,
                groups=[self.group_of[i] for i in chosen],
                gradient_dtype=torch.float32 if code == WIDER else dtype,
                agreeing=agreeing,
                models=weights if mastered else [],
                stochastic=low and self._precision.stochastic_rounding,
                seed=self._precision.seed,
                streams=[self._stream(i) for i in chosen],
            )
            columns(table, chosen)
            jobs.append(Job(self.backend if agreeing else self.slow, table, chosen, share))
        return jobs

    def _stream(self, i: int) -> int:
        """The number of parameter i's stream of random numbers: parts of it that differ draw differently."""
        p, part = self.owners[i], 0
        if is_sharded(p):
            for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                if not placement.is_replicate():
                    part = part * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)  # type: ignore[attr-defined]
        return (i + 65_537 * part) & 0x7FFFFFFF

    def _save_here(self, table: Table, chosen: list[int]) -> None:
        if table.models:  # the masters are the backup
            return
        for i in chosen:
            if i not in self._backups:
                self._backups[i] = torch.empty_like(self.params[i], requires_grad=False)
            table.backups.append(self._backups[i])


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    cache.pop(key, None)
    if len(cache) >= PATTERNS_KEPT:
        cache.pop(next(iter(cache)))
    cache[key] = value
