"""The plan: which tensors a primitive works on, sorted into tables once and kept until something changes.

Every pass reads the parameters' gradients (`Plan.snapshot`) and looks up the tables for what it found. New tables are
built when a gradient appears or disappears, a tensor moves, or parameters are added; otherwise only gradient addresses
are new. Tensors whose layouts differ form tables of their own, which the reference backend runs on whole tensors.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import LOW_PRECISION, NO_ADDRESSES, Backend, StateColumn, Table, UpdateRule
from fused_sam.backends.reference import Reference

from .calls import GradSnapshot, KernelCall, UpdatePlan
from .grad_reader import make_reader
from .layout import (
    in_storage,
    init_state,
    is_dense,
    is_readable,
    is_wrapper,
    match_layout,
    match_scalar,
    place_of,
    same_layout,
    sharing,
)
from .masters import MASTER, Masters
from .parameters import check_parameters, names_of, used_parameters
from .sharding import Sharding, gradient_of, is_sharded, like, local

# What a parameter's gradient is to the plan.
ABSENT, SAME_DTYPE, WIDER_GRAD, LAYOUT_MISMATCH = range(4)

# Tables for as many patterns of present gradients are kept: enough for a few alternating losses or frozen stages.
PATTERNS_KEPT = 16

State = dict[Tensor, dict[str, Any]]

_PARAMS = operator.itemgetter("params")


@dataclass(frozen=True)
class Precision:
    """How bf16 and fp16 parameters are kept: SAM's options of these names."""

    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0


class Plan:
    """Tables for the parameters of an optimizer.

    Args:
        groups: the optimizer's param_groups.
        backend: runs the tables whose tensors have one layout.
        precision: how bf16 and fp16 parameters are kept.
        rule: the fused base optimizer's update rule; None for a base optimizer that runs its own step.
        scaled: returns True for a parameter that an adaptive perturbation scales; None: all.

    Raises:
        ValueError: parameters on several devices, or sharing memory.
        TypeError: complex or integer parameters.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        backend: Backend,
        precision: Precision,
        rule: UpdateRule | None = None,
        scaled: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self.backend = backend
        self.fallback = Reference()
        self._precision = precision
        self._rule = rule
        used = used_parameters(groups)
        members = [[group["params"][i] for i in places] for group, places in zip(groups, used, strict=True)]
        self.params: list[Tensor] = [p for each in members for p in each]  # as user and state have them
        self.local_params = [local(p) for p in self.params]  # this process's parts of them
        self.group_ids = [k for k, each in enumerate(members) for _ in each]
        self._group_sizes = list(map(len, members))
        names = names_of(groups)
        starts = itertools.accumulate((len(group["params"]) for group in groups), initial=0)
        self._names = [names[start + i] for start, places in zip(starts, used, strict=False) for i in places]
        # Unscaled parameters of adaptive groups belong to a twin of their group, which is not adaptive.
        unscaled = [] if scaled is None else [not scaled(p) for p in self.params]
        self.has_twins = any(unscaled)
        if self.has_twins:
            n = len(groups)
            self.group_ids = [k + n * twin for k, twin in zip(self.group_ids, unscaled, strict=True)]
        sharded = any(map(is_sharded, self.params))
        self.sharding = Sharding(self.params, self._names) if sharded else None
        self.reader = make_reader(self.local_params)
        self._places = list(map(place_of, self.local_params))
        # True for each parameter that kernels can take: its values fill one block of memory.
        self.dense = [is_dense(p) and is_readable(p) for p in self.local_params]
        self._numels = [p.numel() for p in self.local_params]
        self._supported = [
            dense and backend.supports(p.device, p.dtype, p.dtype)
            for p, dense in zip(self.local_params, self.dense, strict=True)
        ]
        self._all_supported = all(self._supported) and not sharded
        self._all_same_dtype = bytes([SAME_DTYPE]) * len(self.params)
        self.none_perturbed: list[KernelCall] = []  # what an update undoes if nothing was perturbed
        self._packed = b""  # the gradients' addresses as the reader gave them last ...
        self._addresses = NO_ADDRESSES  # ... and as an array
        self._separated: Any = None  # where the last gradients that share nothing lie, see _separate()
        self._checked = False  # True once gradients were checked against parameters, shape by shape
        self._backups: dict[int, Tensor] = {}
        self.pairs: dict[Any, Any] = {}  # rows of pairs of vectors, see pairs.py
        self.writes = 0  # to such vectors, of the `updated` hook that runs
        self.masters = Masters(self.params, self.local_params, wanted=precision.master_weights)
        self._perturb: dict[Any, list[KernelCall]] = {}
        self._update: dict[Any, UpdatePlan] = {}
        check_parameters(self.local_params, self._names)

    # ---- the parameters the plan was made for ---------------------------------------------------------------

    def name(self, i: int) -> str:
        """Return what errors call parameter i."""
        return self._names[i]

    def matches(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return True if the groups hold the parameters that the plan was made for, at the same addresses."""
        used = used_parameters(groups)
        params = [group["params"][i] for group, places in zip(groups, used, strict=True) for i in places]
        return (
            list(map(len, used)) == self._group_sizes
            and all(map(operator.is_, params, self.params))
            and list(map(place_of, map(local, params))) == self._places
        )

    # ---- reading gradients ----------------------------------------------------------------------------------

    def snapshot(self, groups: Sequence[dict[str, Any]]) -> GradSnapshot | None:
        """Return the gradients as they are now; None if `groups` are not those that the plan was made for.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device than its parameter.
        """
        members = list(map(_PARAMS, groups))
        if self._checked and self._all_supported and list(map(len, members)) == self._group_sizes:
            # The usual case. What the setter of p.grad guarantees was checked once; the rest is read every time.
            try:
                reading = self.reader.read(members)
            except RuntimeError:  # a sparse gradient, or one without memory
                reading = None
            if reading is not None:
                if reading[1] is not self._packed:  # the same object while no address changes
                    self._packed, self._addresses = reading[1], array("q", reading[1])
                codes = bytes([g is not None for g in reading[0]]) if reading[2] else self._all_same_dtype
                return GradSnapshot(reading[0], codes, self._addresses)
        if not self.matches(groups):
            return None
        grads = [self._grad(p, i) for i, p in enumerate(self.params)]
        codes = bytes(self._code(i, g) for i, g in enumerate(grads))
        codes = self._separate(grads, codes)
        self._checked = True
        return GradSnapshot(grads, codes)

    def snapshot_of(self, vector: Iterable[Tensor | None]) -> GradSnapshot:
        """Return a snapshot of another vector than the gradients, such as momentum: a tensor or None per parameter."""
        tensors = list(vector)
        return GradSnapshot(tensors, bytes(self._code(i, v) for i, v in enumerate(tensors)))

    def _grad(self, p: Tensor, i: int) -> Tensor | None:
        g = gradient_of(p)
        if g is not None and is_sharded(p) and not is_sharded(g):
            raise RuntimeError(
                f"{self.name(i)} is sharded and its gradient {tuple(g.shape)} is not: assign DTensors to p.grad"
            )
        if g is not None and g._is_zerotensor():  # it has no memory, and cannot be written
            p.grad = g = torch.zeros_like(p, dtype=g.dtype, requires_grad=False)
        if g is not None and g.is_neg():  # torch does not scale lists of these in place
            p.grad = g = g.resolve_neg()
        return None if g is None else local(g)

    def _separate(self, grads: list[Tensor | None], codes: bytes) -> bytes:
        """Replace gradients that share memory with another one or a parameter, or within, by copies. Return the codes.

        What writes to a gradient (a method, clipping, unscaling) would otherwise write to it twice.
        """
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        # A gradient of its parameter's layout has the parameter's strides, and its dtype is in the code.
        unlike = (g for g, code in zip(grads, codes, strict=True) if code == LAYOUT_MISMATCH)
        others = [(g.stride(), g.dtype) for g in unlike if g is not None]
        place = codes, addresses, others
        if place == self._separated:
            return codes
        rows = [i for i, g in enumerate(grads) if g is not None]
        present: list[Tensor] = [grads[i] for i in rows]  # type: ignore[misc]
        n = len(self.local_params)
        changed = False
        for k, other in enumerate(sharing([*self.local_params, *present])[n:]):
            if other is None:
                continue
            i, p = rows[k], self.params[rows[k]]
            g = torch.empty_like(self.local_params[i], dtype=present[k].dtype, requires_grad=False).copy_(present[k])
            p.grad = like(g, p)
            grads[i], changed = g, True
        self._separated = None if changed else place
        return bytes(self._code(i, g) for i, g in enumerate(grads)) if changed else codes

    def _code(self, i: int, g: Tensor | None) -> int:
        if g is None:
            return ABSENT
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(i)} has a sparse gradient, which SAM does not support: "
                "its norm and perturbation are dense (for nn.Embedding, use sparse=False)"
            )
        p = self.local_params[i]
        if g.shape != p.shape or g.device != p.device:
            raise RuntimeError(
                f"{self.name(i)} is {tuple(p.shape)} on {p.device}, its gradient {tuple(g.shape)} on {g.device}: "
                "zero the gradients and run the backward pass again after moving or reshaping parameters"
            )
        alike = self.dense[i] and same_layout(p, g)
        if not alike or not g.data_ptr() or not in_storage(g, self._numels[i]):
            self._check_memory(i, g)
        if not alike or not self.backend.supports(p.device, p.dtype, g.dtype):
            return LAYOUT_MISMATCH
        if g.is_neg():  # the memory does not have the sign of the value
            return LAYOUT_MISMATCH
        return SAME_DTYPE if g.dtype is p.dtype else WIDER_GRAD

    def _check_memory(self, i: int, g: Tensor) -> None:
        """Refuse a gradient, or another vector's tensor, without memory, and one of a parameter without memory."""
        for what, t in (("is", self.local_params[i]), ("has a gradient that is", g)):
            if is_wrapper(t) and in_storage(t) and t.device.type != "meta":
                raise RuntimeError(
                    f"{self.name(i)} {what} a {type(t).__name__} without memory of its own: "
                    "SAM trains ordinary tensors, so freeze this parameter or train an unwrapped one"
                )
        if not in_storage(g):
            raise RuntimeError(
                f"the storage of the gradient of {self.name(i)} was freed or made smaller: "
                "zero the gradients and run the backward pass again"
            )

    @staticmethod
    def attach(calls: list[KernelCall], snapshot: GradSnapshot) -> None:
        """Put the gradients into the tables; `detach` lets go of them after the primitives have run."""
        for call in calls:
            table, grads, addresses, rows = call.table, snapshot.grads, snapshot.addresses, call.rows
            if len(rows) != len(grads):
                grads = [grads[i] for i in rows]
                if addresses is not None:
                    addresses = array("q", [addresses[i] for i in rows])
            table.grads = grads  # type: ignore[assignment]
            if table.same_layout:
                table.grad_addresses = addresses or array("q", [g.data_ptr() for g in grads])  # type: ignore[union-attr]

    @staticmethod
    def detach(calls: list[KernelCall]) -> None:
        """Drop the gradients from the tables, so that they can be freed."""
        for call in calls:
            call.table.grads = []
            call.table.grad_addresses = NO_ADDRESSES

    # ---- tables ---------------------------------------------------------------------------------------------

    def perturb_calls(self, snapshot: GradSnapshot, perturbed: Sequence[bool], state: State) -> list[KernelCall]:
        """Return calls over all parameters that have a gradient and whose group is perturbed."""
        if self.masters.any_needed:
            self.sync_masters(state, self.none_perturbed)
        key = (snapshot.codes, tuple(perturbed))
        calls = self._perturb.get(key)
        if calls is None:
            n = len(perturbed)
            rows = [i for i, code in enumerate(snapshot.codes) if code and perturbed[self.group_ids[i] % n]]
            calls = self._calls(rows, snapshot.codes, self._add_backups)
            remember(self._perturb, key, calls)
        return calls

    def update_plan(
        self, snapshot: GradSnapshot, perturbed: list[KernelCall], names: tuple[tuple[str, ...], ...], state: State
    ) -> UpdatePlan:
        """Return calls over all parameters with a gradient, and calls that undo `perturbed` where there is none now.

        Args:
            names: for each group, the state that the update reads and writes.
        """
        if self.masters.any_needed:
            self.sync_masters(state, perturbed)
        key = (snapshot.codes, id(perturbed), names)
        found = self._update.get(key)
        if (
            found is None
            or found.perturbed is not perturbed
            or found.spent
            or not self.reader.unchanged(state, found.all_entries, found.entries, found.names, found.columns)
            or (found.new and any(name in state.get(p, ()) for p, name, _ in found.new))
        ):
            found = self._new_update(snapshot.codes, perturbed, names, state)
            remember(self._update, key, found)
        return found

    def forget_state(self) -> None:
        """Drop tables of optimizer state that has been replaced."""
        self._update.clear()
        if self.masters.forget():
            self._perturb.clear()

    def sync_masters(self, state: State, perturbed: list[KernelCall]) -> None:
        """Make the masters agree with state and parameters, except for parameters that undoing `perturbed` writes."""
        if self.masters.any_needed and sum(len(call.rows) for call in perturbed) < len(self.params):
            rows = {i for call in perturbed for i in call.rows}
            self.masters.sync(state, self._match, self._perturb.clear, rows)

    def _new_update(
        self, codes: bytes, perturbed: list[KernelCall], names: tuple[tuple[str, ...], ...], state: State
    ) -> UpdatePlan:
        all_names = {*itertools.chain(*names), *([MASTER] if self.masters.any_needed else [])}
        update = UpdatePlan(perturbed, found={name: [] for name in sorted(all_names)})
        saved = {i for call in perturbed for i in call.rows}
        declared = {column.name: column for column in self._rule.columns} if self._rule else {}
        n = len(names)

        def find(i: int, name: str) -> Tensor:
            """Return this process's part of the state of that name, started if there is none."""
            part_of_param, p = self.local_params[i], self.params[i]
            entry = state.get(p, {})
            value = entry.get(name)
            scalar = name != MASTER and declared[name].scalar
            if value is None:
                part = self.masters[i] if name == MASTER else init_state(declared[name], part_of_param)
                update.new.append((p, name, part if scalar else like(part, p)))
                return part
            if name == MASTER:
                part = self.masters[i]
            else:
                part = match_scalar(value, part_of_param) if scalar else self._match(i, name, value)
            if part is not local(value):
                entry[name] = value = part if scalar else like(part, p)
            update.found[name][-1] = value
            return part

        def state_of(i: int) -> dict[str, Tensor]:
            wanted = names[self.group_ids[i] % n]
            if self.params[i] in state:
                update.entries.append(state[self.params[i]])
                for column in update.found.values():
                    column.append(None)
            every = (*wanted, MASTER)
            return {name: find(i, name) for name in every if name != MASTER or self.masters.needed[i]}

        def add_columns(table: Table, rows: list[int]) -> None:
            if not table.masters:
                table.backups = [self._backups[i] if i in saved else self.local_params[i] for i in rows]
            parts = [state_of(i) for i in rows]
            table.rule = self._rule
            for name in declared:
                table.state[name] = [part.get(name) for part in parts]

        present = [i for i, code in enumerate(codes) if code]
        update.calls = self._calls(present, codes, add_columns)
        for i in present:
            if not self.local_params[i].numel():  # torch gives state to empty parameters too, which no table has
                update.empty_steps += [value for name, value in state_of(i).items() if name == "step"]
        update.restore = self._calls([i for i in sorted(saved) if not codes[i]], self._own_codes(), self._add_backups)
        update.all_entries = list(state.values())
        update.names, update.columns = tuple(update.found), list(update.found.values())
        return update

    def state_part(self, state: State, i: int, name: str, *, init: bool) -> Tensor | None:
        """Return this process's part of a method's own state of parameter i, in the dtype of the arithmetic.

        Args:
            init: True puts zeros into the state if there is none; False returns None then.
        """
        part_of_param, p = self.local_params[i], self.params[i]
        value = state.get(p, {}).get(name)
        if value is None:
            if not init:
                return None
            part = init_state(StateColumn(name), part_of_param)
            state[p][name] = like(part, p)
            return local(state[p][name])
        part = self._match(i, name, value)
        if part is not local(value):
            state[p][name] = like(part, p)
        return part

    def _match(self, i: int, name: str, value: Tensor) -> Tensor:
        """Return this process's part of a parameter's state, sharded, shaped and laid out as the parameter is.

        Raises:
            RuntimeError: it has another shape, or is whole while the parameter is sharded.
        """
        p = self.params[i]
        if is_sharded(p) != is_sharded(value):
            raise RuntimeError(
                f"{self.name(i)} and its {name!r} must both be sharded or both be whole: load the state of sharded "
                "weights with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if is_sharded(p) and (value.placements, value.device_mesh) != (p.placements, p.device_mesh):  # type: ignore[attr-defined]
            value = value.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        if local(value).shape != self.local_params[i].shape:
            raise RuntimeError(
                f"{self.name(i)} has a {name!r} of shape {tuple(value.shape)}: a parameter that changes its shape "
                "needs new state, delete optimizer.state[parameter]"
            )
        return match_layout(local(value), self.local_params[i])

    def inherit(self, old: Plan) -> None:
        """Take over another plan's masters, where the parameters are the same."""
        self.masters.inherit(old.masters, {id(p): i for i, p in enumerate(self.params)})
        if self.sharding is not None and old.sharding is not None:
            self.sharding.inherit(old.sharding)

    def take_over(self, old: Plan, perturbed: list[KernelCall]) -> list[KernelCall]:
        """Return calls that restore what another plan perturbed, for the same parameters at their places here.

        Raises:
            RuntimeError: a perturbed parameter has left the optimizer or changed its shape.
        """
        index = {id(p): i for i, p in enumerate(self.params)}
        rows = []
        for j in (row for call in perturbed for row in call.rows):
            i = index.get(id(old.params[j]))
            clean = old.masters[j] if old.masters.needed[j] else old._backups[j]
            if i is None or clean.shape != self.local_params[i].shape:
                raise RuntimeError(
                    f"{old.name(j)} was perturbed and has been removed or reshaped since: "
                    "call second_step() or restore() before changing parameters"
                )
            if self.masters.needed[i]:
                self.masters.set(i, clean)
            else:
                self._backups[i] = torch.empty_like(self.local_params[i], requires_grad=False).copy_(clean)
            rows.append(i)
        self.masters.init_missing()
        return self._calls(rows, self._own_codes(), self._add_backups)

    def codes_of(self, present: Sequence[bool]) -> bytes:
        """Return codes for these parameters, where no gradient matters."""
        return bytes(code if on else ABSENT for code, on in zip(self._own_codes(), present, strict=True))

    def _own_codes(self) -> bytes:
        """Return codes for copying between parameters and backups, where no gradient matters."""
        return bytes(
            SAME_DTYPE
            if supported and (i not in self._backups or same_layout(p, self._backups[i]))
            else LAYOUT_MISMATCH
            for i, (p, supported) in enumerate(zip(self.local_params, self._supported, strict=True))
        )

    def _calls(
        self, rows: list[int], codes: bytes, add_columns: Callable[[Table, list[int]], None]
    ) -> list[KernelCall]:
        """Return one call per combination of dtypes and layout, in a fixed order. Empty tensors are left out."""
        buckets: dict[tuple[torch.dtype, int, float], list[int]] = {}
        for i in rows:
            if self.local_params[i].numel():
                fraction = 1.0 if self.sharding is None else self.sharding.fractions[i]
                buckets.setdefault((self.local_params[i].dtype, codes[i], fraction), []).append(i)
        calls = []
        for (dtype, code, fraction), members in buckets.items():
            agree = code != LAYOUT_MISMATCH
            low = dtype in LOW_PRECISION
            table = Table(
                params=[self.local_params[i] for i in members],
                group_ids=[self.group_ids[i] for i in members],
                grad_dtype=torch.float32 if code == WIDER_GRAD else dtype,
                same_layout=agree,
                masters=[self.masters[i] for i in members] if low and self._precision.master_weights else [],
                stochastic_rounding=low and self._precision.stochastic_rounding,
                seed=self._precision.seed,
                rng_streams=[self._rng_stream(i) for i in members],
            )
            add_columns(table, members)
            calls.append(KernelCall(self.backend if agree else self.fallback, table, members, fraction))
        return calls

    def _rng_stream(self, i: int) -> int:
        """Return the number of parameter i's stream of random numbers. Different parts of it draw different numbers."""
        p, part = self.params[i], 0
        if is_sharded(p):
            for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                if not placement.is_replicate():
                    part = part * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)  # type: ignore[attr-defined]
        return (i + 65_537 * part) & 0x7FFFFFFF

    def _add_backups(self, table: Table, rows: list[int]) -> None:
        if table.masters:  # they are the backup
            return
        for i in rows:
            if i not in self._backups:
                self._backups[i] = torch.empty_like(self.local_params[i], requires_grad=False)
            table.backups.append(self._backups[i])


def remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep a value under a key, as the youngest of PATTERNS_KEPT."""
    cache.pop(key, None)
    if len(cache) >= PATTERNS_KEPT:
        cache.pop(next(iter(cache)))
    cache[key] = value
