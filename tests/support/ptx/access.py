"""Instructions on memory, and instructions that move data between the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PtxError, UnknownOpcodeError
from .memory import Access, FaultError
from .operands import DTYPES, UNSIGNED, Operation, Read, Run, mods_of, only, reader, writer
from .order import Array
from .parser import Address, Operand, Register, Vector

if TYPE_CHECKING:
    from .machine import Machine

# Hints for caches, and words that change nothing between the blocks of this interpreter.
_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "volatile", "relaxed", "gpu", "cta", "sys"}
_SEMANTICS = {"relaxed": (False, False), "acquire": (True, False), "release": (False, True), "acq_rel": (True, True)}

_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new, "exch": lambda old, new: new, "min": min, "max": max,
    "and": lambda old, new: old & new, "or": lambda old, new: old | new,
}  # fmt: skip


def _checked(op: Operation, run: Run) -> Run:
    """Let a fault name the instruction, the block and the thread."""

    def checked(m: Machine, at: Any) -> None:
        try:
            run(m, at)
        except FaultError as fault:
            raise PtxError(f"{m.where(at, fault.lane)}, {op.text!r}: {fault}") from None

    return checked


def _address(op: Operation, operand: Operand) -> Read:
    """Return a function that reads an address as integers, one for each lane."""
    if not isinstance(operand, Address):
        raise PtxError(f"an operand that is no address: {op.text!r}")
    kind = "u64"
    if isinstance(operand.base, Register) and op.register(operand.base)[1] == 4:
        kind = "u32"
    read, offset = reader(op, operand.base, kind), operand.offset

    def addresses(m: Machine, at: Any) -> Any:
        return np.broadcast_to(read(m, at).astype(np.int64) + offset, m.lanes[at].shape)

    return addresses


def _access(m: Machine, at: Any, addresses: Array) -> Access:
    return Access(addresses, m.warp_of[at], m.block_of[at])


def _shape(op: Operation, mods: list[str]) -> tuple[str, int, str, list[str]]:
    """Return space, number of words, type and other words of the opcode of a load or store."""
    *middle, kind = mods
    spaces = [m.split("::")[0] for m in middle if m.split("::")[0] in ("param", "global", "shared")]
    counts = [int(m[1]) for m in middle if m in ("v2", "v4")]
    if len(spaces) != 1 or len(counts) > 1 or kind not in DTYPES or kind == "pred":
        raise UnknownOpcodeError(op.opcode)
    rest = [m for m in middle if m.split("::")[0] != spaces[0] and m not in ("v2", "v4")]
    rest = [m for m in rest if not m.startswith(("L1::", "L2::"))]
    return spaces[0], counts[0] if counts else 1, kind, rest


def _parts(operand: Operand) -> Sequence[Operand]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _load(op: Operation, mods: list[str]) -> Run:
    space, count, kind, rest = _shape(op, mods)
    only(op, rest, {*_HINTS, "nc"})
    targets, dtype = [writer(op, part, kind) for part in _parts(op.operands[0])], DTYPES[kind]
    addresses, width = _address(op, op.operands[1]), DTYPES[kind].itemsize
    if len(targets) != count or (space == "global" and width == 1):
        raise UnknownOpcodeError(op.text)
    read_only = "nc" in rest

    def load(m: Machine, at: Any) -> None:
        where = addresses(m, at)
        if space == "param":
            values = m.parameters.load(where, width, count)
        elif space == "shared":
            values = m.shared.load(m.shared.in_block(_access(m, at, where)), width, count)
        else:
            values = m.memory.load(_access(m, at, where), width, count, read_only=read_only)
        for write, value in zip(targets, values, strict=True):
            write(m, at, value.view(dtype))

    return _checked(op, load)


def _store(op: Operation, mods: list[str]) -> Run:
    space, count, kind, rest = _shape(op, mods)
    only(op, rest, _HINTS)
    bits = f"b{8 * DTYPES[kind].itemsize}"
    addresses = _address(op, op.operands[0])
    reads = [reader(op, part, bits) for part in _parts(op.operands[1])]
    if len(reads) != count or space == "param" or (space == "global" and DTYPES[kind].itemsize == 1):
        raise UnknownOpcodeError(op.text)

    def store(m: Machine, at: Any) -> None:
        access = _access(m, at, addresses(m, at))
        values = [np.broadcast_to(read(m, at), access.addresses.shape) for read in reads]
        if space == "shared":
            m.shared.store(m.shared.in_block(access), values)
        else:
            m.memory.store(access, values)

    return _checked(op, store)


def _atomic(op: Operation, mods: list[str], *, returns: bool) -> Run:
    *middle, name, kind = mods
    only(op, middle, {"global", "gpu", *_SEMANTICS})
    if "global" not in middle or name not in _ATOMICS or kind not in ("u32", "s32", "b32", "u64", "b64"):
        raise UnknownOpcodeError(op.opcode)
    acquires, releases = next((_SEMANTICS[m] for m in middle if m in _SEMANTICS), (False, False))
    operands = op.operands[1:] if returns else op.operands
    write = writer(op, 0, kind) if returns else None
    addresses, read, dtype, function = (
        _address(op, operands[0]),
        reader(op, operands[1], kind),
        DTYPES[kind],
        _ATOMICS[name],
    )

    def atomic(m: Machine, at: Any) -> None:
        access = _access(m, at, addresses(m, at))
        new = np.broadcast_to(read(m, at), access.addresses.shape)
        old = np.empty(len(new), dtype)
        for k in m.random.permutation(len(new)):
            warp, block = int(access.warps[k]), int(access.blocks[k])
            if releases:
                m.memory.publish(block, warp)
            words, index, place = m.memory.exchange(access, int(k), dtype.itemsize)
            old[k] = words[index : index + 1].view(dtype)[0]
            words[index] = np.asarray(function(old[k], new[k]), dtype).view(words.dtype)
            m.order.atomic(warp, place, acquires=acquires, releases=releases)
        if write is not None:
            write(m, at, old)

    return _checked(op, atomic)


def _fence(op: Operation, mods: list[str]) -> Run:
    only(op, mods, {"gl", "sys", "gpu", "cta", "sc", "acq_rel"})
    block_alone, sequential = "cta" in mods, "acq_rel" not in mods

    def fence(m: Machine, at: Any) -> None:
        if block_alone:
            return
        for warp in np.unique(m.warp_of[at]):
            m.memory.publish(m.block_of_warp(int(warp)), int(warp))
            m.order.fence(int(warp), sequential=sequential)

    return fence


# ---- between the lanes of a warp ------------------------------------------------------------------------------------


def _shuffle(op: Operation, mods: list[str]) -> Run:
    only(op, mods, {"sync", "bfly", "idx", "up", "down", "b32"})
    mode = mods[1]
    found = len(op.operands) == 6  # with a predicate: the source is in range
    write = writer(op, 0, "b32")
    flag = writer(op, 1, "pred") if found else None
    value, b, c, members = (reader(op, k + found, "b32") for k in range(1, 5))

    def shuffle(m: Machine, at: Any) -> None:
        m.require_warps(at, members(m, at))
        lane = m.lane_of[at]
        distance, clamp = b(m, at).astype(np.int64) & 31, c(m, at).astype(np.int64)
        segment, limit = (clamp >> 8) & 31, clamp & 31
        most = (lane & segment) | (limit & ~segment)
        source = {
            "bfly": lane ^ distance, "up": lane - distance, "down": lane + distance,
            "idx": (lane & segment) | (distance & ~segment),
        }[mode]  # fmt: skip
        inside = source >= most if mode == "up" else source <= most
        source = np.where(inside, source, lane)
        everyone = np.broadcast_to(value(m, slice(None)), m.lanes.shape)
        write(m, at, everyone[m.lanes[at] - lane + source])
        if flag is not None:
            flag(m, at, inside)

    return shuffle


def _matrix(op: Operation, mods: list[str], *, store: bool) -> Run:
    """ldmatrix and stmatrix: 8 x 8 matrices of 16-bit elements. Lane 8 k + r has the address of row r of matrix k.

    A lane's register k has two adjacent elements of row lane / 4 of matrix k, or of that column with .trans.
    """
    only(op, mods, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16"})
    count = int(next((m[1] for m in mods if m in ("x1", "x2", "x4")), "0"))
    if "shared" not in mods or count == 0:
        raise UnknownOpcodeError(op.opcode)
    addresses = _address(op, op.operands[0 if store else 1])
    parts = _parts(op.operands[1 if store else 0])
    values = [reader(op, part, "b32") for part in parts] if store else []
    targets = [] if store else [writer(op, part, "b32") for part in parts]
    lanes = np.arange(32)
    row, column = np.repeat(lanes[:, None] // 4, 2, axis=1), 2 * (lanes[:, None] % 4) + [0, 1]
    if "trans" in mods:
        row, column = column, row

    def run(m: Machine, at: Any) -> None:
        m.require_warps(at, np.uint32(0xFFFFFFFF))
        senders = m.lane_of[at] < 8 * count
        access = m.shared.in_block(_access(m, at, addresses(m, at)))
        access = Access(*(x[senders] for x in access))
        warps = len(m.lanes[at]) // 32
        if store:
            held = np.stack([value(m, at) for value in values], axis=1).reshape(warps, 32, count)
            elements = np.empty((warps, count, 8, 8), np.uint16)
            halves = held.transpose(0, 2, 1).copy().view(np.uint16).reshape(warps, count, 32, 2)
            elements[:, :, row, column] = halves
            m.shared.store(access, list(elements.reshape(-1, 8).view(np.uint32).T))
            return
        words = np.stack(m.shared.load(access, 4, 4), axis=1)
        elements = words.view(np.uint16).reshape(warps, count, 8, 8)
        halves = np.ascontiguousarray(elements[:, :, row, column]).view(np.uint32)[..., 0]  # warps, count, 32
        for k, write in enumerate(targets):
            write(m, at, halves[:, k].ravel())

    return _checked(op, run)


def _warp_barrier(op: Operation) -> Run:
    members = reader(op, 0, "b32")
    return lambda m, at: m.require_warps(at, members(m, at))


class Parameters:
    """The bytes of a kernel's arguments."""

    def __init__(self, content: bytes) -> None:
        room = np.zeros(-(-len(content) // 16) * 16 + 16, np.uint8)
        room[: len(content)] = np.frombuffer(content, np.uint8)
        self._size = len(content)
        self._words = {width: room.view(dtype) for width, dtype in UNSIGNED.items()}

    def load(self, addresses: Array, width: int, count: int) -> list[Array]:
        wrong = (addresses < 0) | (addresses + width * count > self._size) | (addresses % (width * count) != 0)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise FaultError(
                lane, f"{width * count} bytes at byte {int(addresses[lane])} of the {self._size} of arguments"
            )
        return [self._words[width][addresses // width + k] for k in range(count)]


def is_point(op: Operation) -> bool:
    """Return True if other blocks and warps may have a turn before the instruction."""
    base, *mods = mods_of(op)
    return base in ("atom", "red", "membar", "fence") or (base == "st" and any(m.startswith("shared") for m in mods))


def build(op: Operation) -> Run | None:
    """Return the function of an instruction on memory or between lanes; None for others."""
    base, *mods = mods_of(op)
    if base == "ld":
        return _load(op, mods)
    if base == "st":
        return _store(op, mods)
    if base in ("atom", "red"):
        return _atomic(op, mods, returns=base == "atom")
    if base in ("membar", "fence"):
        return _fence(op, mods)
    if base == "shfl" and mods[:1] == ["sync"]:
        return _shuffle(op, mods)
    if base in ("ldmatrix", "stmatrix"):
        return _matrix(op, mods, store=base == "stmatrix")
    if base == "bar" and mods == ["warp", "sync"]:
        return _warp_barrier(op)
    return None
