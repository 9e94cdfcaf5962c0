"""Tables for the Triton kernels: the addresses and numbers in device memory, and what keeps them up to date.

All of a table's memory is sent to the device once. Later only what changes is sent, in one copy: the addresses of
gradients and learning rates, and the hyper-parameters. Nothing here makes the host wait for the device.

A capture of a CUDA graph gets device memory of its own. One captured copy fills it from pinned memory that is not
written after the capture (memory.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fused_sam.backends.contract import (
    NO_ADDRESSES,
    PerturbGroup,
    Table,
    VectorPair,
    status_dtype,
)

from . import layout
from .device import Blocks, device_of
from .memory import WORD, Memory, Reserve

ROW = layout.ROW  # words, as all sizes and offsets below
GROUP_WORDS = layout.GROUP_SIZE // 2



class Native:
    """The backend's form of a table: its cut into blocks, its memory, and the launchers of compiled kernels.

    Args:
        tensors: one per row.
        sums: how many numbers each program of a reduction leaves in slots.
        changing: words of each array that is sent again when it has changed.
    """

    def __init__(self, tensors: Sequence[Tensor], sums: int, changing: dict[str, int]) -> None:
        self.device = device_of(tensors[0].device)
        sizes = [t.numel() for t in tensors]
        self.blocks = Blocks.cut(sizes, self.device)
        self.programs = min(self.blocks.count, self.device.programs)  # of a reduction, at most
        self.launchers: dict[Any, Any] = {}
        self._changing = changing
        self._slots = sums * self.device.slots * status_dtype(tensors[0].device).itemsize // WORD
        self._rows = array("q", bytes(ROW * WORD * len(sizes)))
        self._rows[layout.SIZE :: ROW] = array("q", sizes)
        self._rows[layout.FIRST_BLOCK :: ROW] = array("q", self.blocks.first)
        # "one" is the number 1, for kernels that get no grad_scale.
        self._fixed = {"rows": ROW * len(sizes), "block_row": (self.blocks.count + 1) // 2, "ticket": 1, "one": 1}
        self.words_to_send = sum(changing.values()) + sum(self._fixed.values())
        self._memory: Memory | None = None

    def new_memory(self) -> Memory:
        """Return memory that holds what never changes; nothing is sent yet."""
        blocks = self.blocks
        memory = Memory(self.device.device, self._changing, self._fixed, self._slots)
        memory.write("rows", self._rows)
        ends = [*blocks.first[1:], blocks.count]
        block_row = array("i")
        for row, (begin, end) in enumerate(zip(blocks.first, ends, strict=True)):
            block_row.extend(array("i", (row,)) * (end - begin))
        block_row.extend([0] * (len(block_row) % 2))
        memory.write("block_row", array("q", block_row.tobytes()))
        memory.write_packed("one", 0, "f", 1.0)
        return memory


class NativeTable(Native):
    """A table of the primitives on parameters."""

    def __init__(self, table: Table) -> None:
        params, self._groups = table.params, max(table.group_ids) + 1
        changing = {"grads": len(params), "lrs": self._groups, "groups": GROUP_WORDS * self._groups}
        super().__init__(params, 1, changing)
        self._fill(layout.PARAM, params)
        self._fill(layout.CLEAN, table.masters or table.backups or params)
        self._rows[layout.GROUP :: ROW] = array("q", table.group_ids)
        if table.rule is not None:
            for name, column in table.state.items():
                self._fill(layout.state_place(table.rule, name), column)
        elif table.second_moments:
            self._fill(layout.STATE, table.second_moments)
        if table.rng_streams:
            self._rows[layout.RNG_STREAM :: ROW] = array("q", table.rng_streams)
        self.masters = bool(table.masters)
        self.amsgrad = any(t is not None for t in table.state.get("max_exp_avg_sq", ()))
        self._grads = NO_ADDRESSES
        self._written: dict[int, Any] = {}  # the groups in the memory's image, by the first place of their part
        self._unsent = 0  # words of the image that the device does not have yet
        self._captured: Memory | None = None

    def _fill(self, place: int, column: Sequence[Tensor | None]) -> None:
        self._rows[place::ROW] = array("q", [0 if t is None else t.data_ptr() for t in column])

    def for_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, reserve: Reserve) -> Memory:
        """Return the memory with this call's gradients and groups."""
        if not self.device.capturing():
            return self._refreshed(table, groups, reserve)
        memory = self._captured = self._for_capture(table, groups, reserve)
        return memory

    def after_norm(self, table: Table, groups: Sequence[Any], reserve: Reserve) -> Memory:
        """Return the memory with this call's gradients and groups; in a capture, the memory of the norm before it."""
        memory, self._captured = self._captured, None
        if not self.device.capturing():
            return self._refreshed(table, groups, reserve)
        if memory is None:
            return self._for_capture(table, groups, reserve)
        self._write_groups(memory, groups, table.seed)
        memory.update_capture()  # the copy that the norm has captured sends these groups as well
        return memory

    def for_restore(self, table: Table, reserve: Reserve) -> Memory:
        """Return the memory with the rows; all else in it may be old."""
        capturing = self.device.capturing()
        if self._memory is None or self._unsent:
            return (self._for_capture if capturing else self._refreshed)(table, None, reserve)
        if not capturing:
            return self._memory
        reserve.keep(self._memory)
        return self._memory

    def _refreshed(self, table: Table, groups: Sequence[Any] | None, reserve: Reserve) -> Memory:
        """Return the memory after sending what has changed; outside captures."""
        # An interrupt may come at any line. `_unsent` is raised before the image changes, and cleared after the copy.
        new = self._memory is None
        memory = self._memory or self.new_memory()
        if new:
            self._unsent = memory.sent
            self._memory = memory
        if table.grad_addresses is not table.bound_grads and table.grad_addresses != self._grads:
            self._unsent = max(self._unsent, memory.changing)
            memory.write("grads", table.grad_addresses)
            self._grads = table.grad_addresses
        table.bound_grads = table.grad_addresses
        if groups is not None:
            kind, groups = type(groups[0]), groups[: self._groups]
            part = 0 if kind is PerturbGroup else layout.UPDATE
            written = (kind, table.seed, _by_value(groups))
            if self._written.get(part) != written:
                self._unsent = max(self._unsent, memory.changing)
                self._write_groups(memory, groups, table.seed)
                self._written[part] = written
        if self._unsent:
            memory.send(self._unsent)
            self._unsent = 0
        reserve.stock(memory, new=new)
        return memory

    def _for_capture(self, table: Table, groups: Sequence[Any] | None, reserve: Reserve) -> Memory:
        """Return new memory, which a captured copy fills."""
        pinned = reserve.take(self.words_to_send)
        memory = self.new_memory()
        memory.write("grads", table.grad_addresses)
        if groups is not None:
            self._write_groups(memory, groups, table.seed)
        memory.capture_send(pinned)
        reserve.keep(memory)
        return memory

    def _write_groups(self, memory: Memory, groups: Sequence[Any], seed: int) -> None:
        """Write the numbers of all groups, at the places in layout.py."""
        for k, group in enumerate(groups[: self._groups]):
            first, numbers = layout.numbers_of(group)
            memory.write_packed("groups", k * GROUP_WORDS + first // 2, f"{len(numbers)}f", *numbers)
            memory.write_packed("groups", k * GROUP_WORDS + layout.SEED // 2, "Q", seed & 0xFFFFFFFFFFFFFFFF)
            if not isinstance(group, PerturbGroup):
                own = memory.addresses["groups"] + k * GROUP_WORDS * WORD + layout.LR * 4
                memory.write_packed("lrs", k, "q", group.lr.data_ptr() if _read_in_place(group.lr, memory) else own)
        probs = [group.mask_prob for group in groups if isinstance(group, PerturbGroup)]
        if probs:
            memory.masked = min(probs) < 1


def copy_lrs(memory: Memory, groups: Sequence[Any]) -> None:
    """Copy learning rates that are not fp32 numbers on the table's device to their places in the groups."""
    if not any(isinstance(group.lr, Tensor) for group in groups):
        return
    for k, group in enumerate(groups[: len(memory.tensor("lrs"))]):
        if isinstance(group.lr, Tensor) and not _read_in_place(group.lr, memory):
            to = memory.tensor("groups")[k * layout.GROUP_SIZE + layout.LR]
            to.copy_(group.lr.reshape(()), non_blocking=True)


def _read_in_place(lr: Any, memory: Memory) -> TypeGuard[Tensor]:
    """Return True if the kernels read a learning rate where it is."""
    return isinstance(lr, Tensor) and lr.dtype is torch.float32 and lr.device == memory.words.device


def _by_value(groups: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return what to compare groups by. A learning rate on the device counts by its address, not by its number."""
    return [(id(g[0]), g[0].data_ptr(), *g[1:]) if isinstance(g[0], Tensor) else g for g in groups]


class NativePair(Native):
    """A table of the primitives over two vectors."""

    def __init__(self, pair: VectorPair) -> None:
        n = len(pair.x)
        super().__init__(pair.x, 3, {"x": n, "y": n, "out": n})
        self._columns: list[array[int]] = []

    def memory(self, x: Sequence[Tensor], y: Sequence[Tensor], out: Sequence[Tensor], reserve: Reserve) -> Memory:
        """Return the memory with these tensors' addresses."""
        columns = [array("q", [t.data_ptr() for t in column]) for column in (x, y, out)]
        if self.device.capturing():
            pinned = reserve.take(self.words_to_send)
            memory = self.new_memory()
            _write_columns(memory, columns)
            memory.capture_send(pinned)
            reserve.keep(memory)
            return memory
        memory = self._memory or self.new_memory()
        new = self._memory is None
        if columns != self._columns:
            _write_columns(memory, columns)
            memory.send(memory.sent if new else memory.changing)
            self._columns = columns
        reserve.stock(memory, new=new)
        self._memory = memory
        return memory


def _write_columns(memory: Memory, columns: Sequence[array[int]]) -> None:
    for name, column in zip(("x", "y", "out"), columns, strict=True):
        memory.write(name, column)
