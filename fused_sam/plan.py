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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends.contract import LOW_PRECISION, NO_ADDRESSES, Backend, Table, arithmetic_dtype
from .backends.reference import Reference
from .reader import Reader, make_reader

# What a parameter's gradient is to the plan.
ABSENT, ALIKE, WIDER, DISAGREEING = range(4)

# Tables of as many patterns of present gradients are kept: enough for a few alternating losses or frozen stages.
PATTERNS_KEPT = 16


@dataclass(eq=False)
class Scan:
    """What the parameters' gradients are at this moment. Short-lived: it keeps the gradients alive."""

    gradients: list[Tensor | None]
    codes: bytes  # ABSENT .. DISAGREEING for each parameter
    addresses: array[int] | None = None  # of the gradients, where they have been read already: then none is absent

    def present(self) -> list[Tensor]:
        if self.addresses is not None:
            return self.gradients  # type: ignore[return-value]
        return [g for g in self.gradients if g is not None]


@dataclass(eq=False)
class Job:
    """A table, the backend that runs it, and the parameters its rows are."""

    backend: Backend
    table: Table
    rows: list[int]

    def attach(self, scan: Scan) -> None:
        table, gradients, addresses = self.table, scan.gradients, scan.addresses
        if len(self.rows) != len(gradients):
            gradients = [gradients[i] for i in self.rows]
            addresses = None if addresses is None else array("q", [addresses[i] for i in self.rows])
        table.gradients = gradients  # type: ignore[assignment]
        if table.agreeing:
            table.gradient_addresses = addresses or array("q", [g.data_ptr() for g in gradients])  # type: ignore[union-attr]

    def detach(self) -> None:
        self.table.gradients = []
        self.table.gradient_addresses = NO_ADDRESSES


class attached:  # noqa: N801  # a context manager, and twice as fast as a generator's
    """Let the tables have the gradients while the primitives run, and no longer, so that they can be freed."""

    def __init__(self, jobs: list[Job], scan: Scan) -> None:
        self._jobs = jobs
        for job in jobs:
            job.attach(scan)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for job in self._jobs:
            job.detach()


@dataclass(eq=False)
class Update:
    """The jobs of one update, and the optimizer state that their tables point to."""

    perturbed: list[Job]  # what it undoes
    jobs: list[Job] = field(default_factory=list)
    restore: list[Job] = field(default_factory=list)  # perturbed, and without a gradient to be updated with
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # weight, buffer of -0.0 that is to enter the state
    entries: list[dict[str, Any]] = field(default_factory=list)  # states of weights that had a buffer before ...
    buffers: list[Tensor] = field(default_factory=list)  # ... and the buffers
    all_entries: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """The update has happened: momentum that it began is part of the state now."""
        for p, buffer in self.new:
            state[p]["momentum_buffer"] = buffer

    def stands_on(self, state: dict[Tensor, dict[str, Any]], reader: Reader) -> bool:
        """Whether the state still holds the buffers that the tables point to, and none where they begin one."""
        return reader.unchanged(
            state, self.all_entries, self.entries, self.buffers, "momentum_buffer"
        ) and not any("momentum_buffer" in state.get(p, ()) for p, _ in self.new)


class Plan:
    """Tables for the parameters of an optimizer.

    Args:
        groups: the optimizer's param_groups.
        backend: what runs the tables whose tensors agree.

    Raises:
        ValueError: parameters on several devices, or sharing memory.
        TypeError: complex or integer parameters.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], backend: Backend) -> None:
        self.backend = backend
        self._slow = Reference()
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.group_of = [k for k, group in enumerate(groups) for _ in group["params"]]
        self._group_sizes = [len(group["params"]) for group in groups]
        self._names = _names(groups)
        self.reader = make_reader(self.params)
        self._places = [(p.data_ptr(), p.dtype, p.shape) for p in self.params]
        self._flat = [_is_flat(p) for p in self.params]
        self._served = [
            flat and backend.serves(p.device, p.dtype, p.dtype) for p, flat in zip(self.params, self._flat, strict=True)
        ]
        self._all_served = all(self._served)
        self._all_alike = bytes([ALIKE]) * len(self.params)
        self.nothing: list[Job] = []  # what an update undoes where nothing was perturbed
        self._checked = False  # gradients against weights, shape by shape
        self._backups: dict[int, Tensor] = {}
        self._perturb: dict[Any, list[Job]] = {}
        self._update: dict[Any, Update] = {}
        self._check()

    # ---- what the plan stands on --------------------------------------------------------------------------

    def name(self, i: int) -> str:
        """What errors call parameter i."""
        return self._names[i]

    def _check(self) -> None:
        devices: dict[torch.device, int] = {}
        spans = []
        for i, p in enumerate(self.params):
            devices.setdefault(p.device, i)
            if p.dtype not in (torch.float32, torch.float64, *LOW_PRECISION):
                raise TypeError(
                    f"{self.name(i)} is {p.dtype}: SAM takes real floating-point weights; "
                    "store a complex weight as pairs of reals and use torch.view_as_complex in forward()"
                )
            if p.numel():
                size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
                spans.append((p.device.index or 0, p.data_ptr(), p.data_ptr() + size * p.element_size(), i))
        if len(devices) > 1:
            where = ", ".join(f"{self.name(i)} on {device}" for device, i in devices.items())
            raise ValueError(f"SAM takes parameters of one device; got {where}: use one optimizer a device")
        spans.sort()
        for (device, _, end, i), (other_device, begin, _, j) in itertools.pairwise(spans):
            if device == other_device and begin < end and begin > 0 and not self._interleaved(i, j):
                raise ValueError(
                    f"{self.name(i)} and {self.name(j)} share memory: perturbing one would perturb the other; "
                    "pass each weight once"
                )

    def _interleaved(self, i: int, j: int) -> bool:
        """Whether one of two weights has gaps: columns of one matrix overlap in span, not in elements."""
        return not (self._flat[i] and self._flat[j])

    def holds(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the parameters are still those planned for, where they were."""
        params = [p for group in groups for p in group["params"]]
        return (
            [len(group["params"]) for group in groups] == self._group_sizes
            and all(map(operator.is_, params, self.params))
            and [(p.data_ptr(), p.dtype, p.shape) for p in params] == self._places
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
        gradients = [p.grad for p in self.params]
        codes = bytes(self._code(i, g) for i, g in enumerate(gradients))
        self._checked = True
        return Scan(gradients, codes)

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
        if not self._flat[i] or not _alike(p, g) or not self.backend.serves(p.device, p.dtype, g.dtype):
            return DISAGREEING
        return ALIKE if g.dtype is p.dtype else WIDER

    # ---- tables -------------------------------------------------------------------------------------------

    def perturbation(self, scan: Scan, perturbed: Sequence[bool]) -> list[Job]:
        """Jobs over all weights that have a gradient and whose group is perturbed."""
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
        with_momentum: Sequence[bool],
        state: dict[Tensor, dict[str, Any]],
    ) -> Update:
        """Jobs over all weights that have a gradient, and those that undo `perturbed` where there is none any more."""
        key = (scan.codes, id(perturbed), tuple(with_momentum))
        found = self._update.get(key)
        if found is None or found.perturbed is not perturbed or not found.stands_on(state, self.reader):
            found = self._new_update(scan.codes, perturbed, with_momentum, state)
            _remember(self._update, key, found)
        return found

    def forget_state(self) -> None:
        """Let go of optimizer state that has been replaced."""
        self._update.clear()

    def _new_update(
        self,
        codes: bytes,
        perturbed: list[Job],
        with_momentum: Sequence[bool],
        state: dict[Tensor, dict[str, Any]],
    ) -> Update:
        update = Update(perturbed)
        saved = {i for job in perturbed for i in job.rows}

        def momentum(i: int) -> Tensor | None:
            p = self.params[i]
            if not with_momentum[self.group_of[i]]:
                return None
            entry = state.get(p, {})
            buffer = entry.get("momentum_buffer")
            if buffer is None:
                buffer = torch.full_like(p, -0.0, dtype=arithmetic_dtype(p.dtype), requires_grad=False)
                update.new.append((p, buffer))
                return buffer
            entry["momentum_buffer"] = buffer = _fitting(buffer, p)
            update.entries.append(entry)
            update.buffers.append(buffer)
            return buffer

        def columns(table: Table, rows: list[int]) -> None:
            table.backups = [self._backups[i] if i in saved else self.params[i] for i in rows]
            table.momenta = [momentum(i) for i in rows]

        present = [i for i, code in enumerate(codes) if code]
        update.jobs = self._jobs(present, codes, columns)
        for i in present:
            if not self.params[i].numel():
                momentum(i)  # torch gives state to empty weights as well, though no table has them
        update.restore = self._jobs([i for i in sorted(saved) if not codes[i]], self._own_codes(), self._save_here)
        update.all_entries = list(state.values())
        return update

    def adopt(self, old: Plan, perturbed: list[Job]) -> list[Job]:
        """Take over what another plan perturbed: jobs that restore the same weights where they are now.

        Raises:
            RuntimeError: a perturbed weight has left the optimizer or changed its shape.
        """
        index = {id(p): i for i, p in enumerate(self.params)}
        rows = []
        for j in (row for job in perturbed for row in job.rows):
            i = index.get(id(old.params[j]))
            if i is None or old._backups[j].shape != self.params[i].shape:
                raise RuntimeError(
                    f"{old.name(j)} was perturbed and has been removed or reshaped since: "
                    "call second_step() or restore() before changing weights"
                )
            self._backups[i] = old._backups[j].to(self.params[i].device, self.params[i].dtype)
            rows.append(i)
        return self._jobs(rows, self._own_codes(), self._save_here)

    def _own_codes(self) -> bytes:
        """Codes for copying between weights and backups, where no gradient matters."""
        return bytes(
            ALIKE if served and (i not in self._backups or _alike(p, self._backups[i])) else DISAGREEING
            for i, (p, served) in enumerate(zip(self.params, self._served, strict=True))
        )

    def _jobs(self, rows: list[int], codes: bytes, columns: Callable[[Table, list[int]], None]) -> list[Job]:
        """One job for each combination of dtypes and agreement, in a fixed order; empty tensors are left out."""
        buckets: dict[tuple[torch.dtype, int], list[int]] = {}
        for i in rows:
            if self.params[i].numel():
                buckets.setdefault((self.params[i].dtype, codes[i]), []).append(i)
        jobs = []
        for (dtype, code), chosen in buckets.items():
            agreeing = code != DISAGREEING
            table = Table(
                weights=[self.params[i] for i in chosen],
                groups=[self.group_of[i] for i in chosen],
                gradient_dtype=torch.float32 if code == WIDER else dtype,
                agreeing=agreeing,
            )
            columns(table, chosen)
            jobs.append(Job(self.backend if agreeing else self._slow, table, chosen))
        return jobs

    def _save_here(self, table: Table, chosen: list[int]) -> None:
        for i in chosen:
            if i not in self._backups:
                self._backups[i] = torch.empty_like(self.params[i], requires_grad=False)
            table.backups.append(self._backups[i])


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    cache.pop(key, None)
    if len(cache) >= PATTERNS_KEPT:
        cache.pop(next(iter(cache)))
    cache[key] = value


def _fitting(buffer: Tensor, p: Tensor) -> Tensor:
    """A momentum buffer in the arithmetic's dtype and the weight's layout, the buffer itself where it has them.

    bf16 and fp16 weights have it in fp32: added up in bf16, contributions below 2^-9 of the sum would be lost.
    """
    dtype = arithmetic_dtype(p.dtype)
    if buffer.dtype is dtype and buffer.device == p.device and _alike(p, buffer):
        return buffer
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(buffer)


def _is_flat(t: Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each place once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return t.layout is torch.strided


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(n <= 1 or s == t for n, s, t in strides)


def _names(groups: Sequence[dict[str, Any]]) -> list[str]:
    """How errors call the parameters: by their names where the optimizer was given them."""
    names = []
    for k, group in enumerate(groups):
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            title = f"parameter {given[i]!r}" if given else f"parameter {i} of group {k}"
            names.append(f"{title} (shape {tuple(p.shape)})")
    return names
