"""Tables of addresses for the Triton kernels: one piece of device memory a table, and what keeps it up to date.

A table's memory is sent to the device once; then only what changes is sent again, in one copy, when it has changed:
addresses of gradients, addresses of learning rates, hyper-parameters. Nothing here makes the host wait for the device.

What a CUDA graph's capture uses is made for it alone: fresh device memory, filled by one captured copy out of pinned
memory that is never written again (memory.py).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fused_sam.backends.contract import NO_ADDRESSES, Group, Lists, Table, status_dtype

from . import layout
from .memory import WORD, Memory, Reserve

ROW = layout.ROW  # words, as all sizes and offsets below
HYPER = layout.HYPER // 2  # words of a group's hyper-parameters


@dataclass(frozen=True)
class Device:
    """What the launches depend on."""

    device: torch.device
    processors: int
    warp: int  # threads

    @property
    def programs(self) -> int:
        """Of a reduction, at most: 8 of 256 threads are all that a processor holds at a time."""
        return 8 * self.processors

    @property
    def slots(self) -> int:
        """For their sums: a power of 2, as Triton wants."""
        return 1 << (self.programs - 1).bit_length()

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    def capturing(self) -> bool:
        if self.device.type == "cpu":
            return False
        capturing = getattr(self._module, "is_current_stream_capturing", None)
        return capturing is not None and capturing()

    def current(self) -> AbstractContextManager[Any]:
        """Launches go to this device."""
        if self.device.type == "cpu" or self._module.current_device() == self.device.index:
            return nullcontext()
        return self._module.device(self.device)


@lru_cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":  # the interpreter: few processors, so that small tests see what large models do
        return Device(device, 4, 32)
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    return Device(device, processors, getattr(properties, "warp_size", 32))


@dataclass(frozen=True)
class Blocks:
    """How tensors are cut: `size` elements a block, `warps` for each, and what every row's first block is."""

    size: int
    warps: int
    count: int
    first: list[int]

    @staticmethod
    def cut(sizes: Sequence[int], device: Device) -> Blocks:
        """2048 elements for each 256 threads, or 512 for 64 where that would not give each processor two blocks.

        Eight elements a thread are one 16-byte access of a column in bf16 and two in fp32, and leave registers enough
        for six blocks a processor (40 of them in perturb and sgd in fp32) and three of adam (72). These have 150 KB of
        an fp32 update under way, adam's 98, where an H100 needs 20 and a B200 45 (latency of 0.7 us times bandwidth):
        more elements a thread gain nothing, fewer make looking up the addresses weigh more.
        """
        size, threads = (2048, 256) if sum(sizes) >= 2 * 2048 * device.processors else (512, 64)
        ends = list(accumulate(-(-n // size) for n in sizes))
        return Blocks(size, max(threads // device.warp, 1), ends[-1], [0, *ends[:-1]])


class Native:
    """What the backend keeps for a table: its cut into blocks, its memory, and the compiled kernels' launchers."""

    def __init__(self, tensors: Sequence[Tensor], sums: int, changing: dict[str, int]) -> None:
        self.device = device_of(tensors[0].device)
        sizes = [t.numel() for t in tensors]
        self.blocks = Blocks.cut(sizes, self.device)
        self.programs = min(self.blocks.count, self.device.programs)
        self.launchers: dict[Any, Any] = {}
        self._changing = changing
        self._unsent = sums * self.device.slots * status_dtype(tensors[0].device).itemsize // WORD
        self._rows = array("q", bytes(ROW * WORD * len(sizes)))
        self._rows[layout.SIZE :: ROW] = array("q", sizes)
        self._rows[layout.FIRST :: ROW] = array("q", self.blocks.first)
        self._fixed = {"rows": ROW * len(sizes), "owner": (self.blocks.count + 1) // 2, "counter": 1, "unit": 1}
        self.words_to_send = sum(changing.values()) + sum(self._fixed.values())
        self._memory: Memory | None = None

    def new_memory(self) -> Memory:
        """Memory that holds what never changes; nothing is sent yet."""
        blocks = self.blocks
        memory = Memory(self.device.device, self._changing, self._fixed, self._unsent)
        memory.write("rows", self._rows)
        ends = [*blocks.first[1:], blocks.count]
        owner = array("i")
        for row, (begin, end) in enumerate(zip(blocks.first, ends, strict=True)):
            owner.extend(array("i", (row,)) * (end - begin))
        owner.extend([0] * (len(owner) % 2))
        memory.write("owner", array("q", owner.tobytes()))
        memory.write_packed("unit", 0, "f", 1.0)
        return memory


class NativeTable(Native):
    """For the primitives on weights."""

    def __init__(self, table: Table) -> None:
        w, self._groups = table.weights, max(table.groups) + 1
        changing = {"gradients": len(w), "rates": self._groups, "hyper": HYPER * self._groups}
        super().__init__(w, 1, changing)
        for column, tensors in (
            (layout.WEIGHT, w),
            (layout.BACKUP, table.backups or w),
            (layout.MODEL, table.models),
            (layout.MOMENTUM, table.momenta),
            (layout.SQUARE, table.squares),
            (layout.LARGEST, table.largest),
            (layout.STEP, table.steps),
        ):
            self._fill(column, tensors)
        self._rows[layout.GROUP :: ROW] = array("q", table.groups)
        if table.streams:
            self._rows[layout.STREAM :: ROW] = array("q", table.streams)
        self.model = table.models[0].dtype if table.models else None
        self.with_largest = any(t is not None for t in table.largest)
        self._seed = table.seed
        self._gradients = NO_ADDRESSES
        self._climb: Any = None  # the hyper-parameters that were sent
        self._descend: Any = None
        self._captured: Memory | None = None

    def _fill(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        if tensors:
            self._rows[column::ROW] = array("q", [0 if t is None else t.data_ptr() for t in tensors])

    def for_norm(self, table: Table, groups: Sequence[Group], reserve: Reserve, *, climb: bool) -> Memory:
        """The memory with this call's gradients and hyper-parameters."""
        if not self.device.capturing():
            return self._refreshed(table, groups, reserve, climb=climb)
        memory = self._captured = self._for_graph(table, groups, reserve)
        return memory

    def after_norm(self, table: Table, groups: Sequence[Group], reserve: Reserve, *, climb: bool) -> Memory:
        """The same; while a graph is captured, what the norm before has had sent is used again."""
        memory, self._captured = self._captured, None
        if not self.device.capturing():
            return self._refreshed(table, groups, reserve, climb=climb)
        return memory or self._for_graph(table, groups, reserve)

    def for_restore(self, table: Table, reserve: Reserve) -> Memory:
        """The memory, of whose contents only what never changes counts."""
        if not self.device.capturing():
            return self._memory or self._refreshed(table, (), reserve, climb=True)
        if self._memory is None:
            return self._for_graph(table, (), reserve)
        reserve.keep(self._memory)
        return self._memory

    def _refreshed(self, table: Table, groups: Sequence[Group], reserve: Reserve, *, climb: bool) -> Memory:
        memory = self._memory or self.new_memory()
        groups = groups[: self._groups]
        stale = False
        if table.gradient_addresses is not table.bound and table.gradient_addresses != self._gradients:
            memory.write("gradients", table.gradient_addresses)
            self._gradients = table.gradient_addresses
            stale = True
        table.bound = table.gradient_addresses
        # Sent whole, compared in part: a learning rate that changes every step is no news to the perturbation.
        different = (_climb(groups) != self._climb) if climb else (_descend(groups) != self._descend)
        if different or table.seed != self._seed:
            self._climb, self._descend, self._seed = _climb(groups), _descend(groups), table.seed
            write_groups(memory, groups, table.seed)
            stale = True
        fresh = self._memory is None
        if fresh or stale:
            memory.send(memory.sent if fresh else memory.changing)
        reserve.stock(memory, fresh=fresh)
        self._memory = memory
        return memory

    def _for_graph(self, table: Table, groups: Sequence[Group], reserve: Reserve) -> Memory:
        pinned = reserve.take(self.words_to_send)
        memory = self.new_memory()
        memory.write("gradients", table.gradient_addresses)
        write_groups(memory, groups[: self._groups], table.seed)
        memory.send_in_graph(pinned)
        reserve.keep(memory)
        return memory


class NativeLists(Native):
    """For the primitives on gradients and kept vectors."""

    def __init__(self, lists: Lists) -> None:
        n = len(lists.x)
        super().__init__(lists.x, 3, {"xs": n, "ys": n, "outs": n})
        self._columns: list[array[int]] = []

    def memory(self, x: Sequence[Tensor], y: Sequence[Tensor], out: Sequence[Tensor], reserve: Reserve) -> Memory:
        """The memory with these tensors' addresses."""
        columns = [array("q", [t.data_ptr() for t in column]) for column in (x, y, out)]
        if self.device.capturing():
            pinned = reserve.take(self.words_to_send)
            memory = self.new_memory()
            _write_columns(memory, columns)
            memory.send_in_graph(pinned)
            reserve.keep(memory)
            return memory
        memory = self._memory or self.new_memory()
        fresh = self._memory is None
        if columns != self._columns:
            _write_columns(memory, columns)
            memory.send(memory.sent if fresh else memory.changing)
            self._columns = columns
        reserve.stock(memory, fresh=fresh)
        self._memory = memory
        return memory


def _write_columns(memory: Memory, columns: Sequence[array[int]]) -> None:
    for name, column in zip(("xs", "ys", "outs"), columns, strict=True):
        memory.write(name, column)


def write_groups(memory: Memory, groups: Sequence[Group], seed: int) -> None:
    """Hyper-parameters of all groups, at the places that layout.py names."""
    memory.chooses = any(h.share < 1 for h in groups)
    for k, h in enumerate(groups):
        lr = 0.0 if isinstance(h.lr, Tensor) else h.lr
        memory.write_packed(
            "hyper", k * HYPER, "20f",
            h.rho / h.share, h.eta, h.adaptive, lr, h.weight_decay, h.momentum, 1 - h.dampening, h.nesterov,
            -1.0 if h.maximize else 1.0, h.max_norm if h.max_norm <= 3e38 else math.inf, h.share,
            h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2, _log(h.beta1), _log(h.beta2),
            h.adam_eps, h.decoupled, h.amsgrad,
        )  # fmt: skip
        memory.write_packed("hyper", k * HYPER + layout.SEED // 2, "Q", seed & 0xFFFFFFFFFFFFFFFF)
        own = memory.addresses["hyper"] + k * HYPER * WORD + layout.RATE * 4
        memory.write_packed("rates", k, "q", h.lr.data_ptr() if _read_in_place(h.lr, memory) else own)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def copy_rates(memory: Memory, groups: Sequence[Group]) -> None:
    """Bring learning rates here that lie on the device in another type, or on another device."""
    if not any(isinstance(h.lr, Tensor) for h in groups):
        return
    for k, h in enumerate(groups[: len(memory.tensor("rates"))]):
        if isinstance(h.lr, Tensor) and not _read_in_place(h.lr, memory):
            place = memory.tensor("hyper")[k * layout.HYPER + layout.RATE]
            place.copy_(h.lr.reshape(()), non_blocking=True)


def _read_in_place(lr: Any, memory: Memory) -> TypeGuard[Tensor]:
    return isinstance(lr, Tensor) and lr.dtype is torch.float32 and lr.device == memory.words.device


_CLIMB = itemgetter(*map(Group._fields.index, ("rho", "adaptive", "eta", "share")))


def _climb(groups: Sequence[Group]) -> Any:
    """What perturb reads of the groups."""
    return list(map(_CLIMB, groups))


def _descend(groups: Sequence[Group]) -> Any:
    """What the updates read of the groups; a learning rate that is a tensor counts by where it is, not by its value."""
    return [(id(g.lr), g.lr.data_ptr(), *g[4:]) if isinstance(g.lr, Tensor) else g[3:] for g in groups]
