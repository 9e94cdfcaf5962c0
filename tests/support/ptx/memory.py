"""Global and shared memory with their checks. A place is two bytes, the smallest element of a tensor.

Global memory is the host's own. What a kernel stores there is first seen by its own block alone, and by the others when
a fence or the end of the launch publishes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .order import NONE, Array, History, Order

PLACE = 2  # bytes
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Region(NamedTuple):
    """Memory that a launch may access."""

    address: int
    size: int  # bytes
    name: str


class Access(NamedTuple):
    """Who accesses what: for every lane its address, warp and block."""

    addresses: Array  # int64
    warps: Array
    blocks: Array


class FaultError(Exception):
    """Raised with the index of the first lane that does something wrong."""

    def __init__(self, lane: int, reason: str) -> None:
        super().__init__(reason)
        self.lane = lane


class Memory:
    """Words at addresses from `base` on, and the history of every place."""

    def __init__(self, words: Array, base: int, places: int, order: Order, *, races: bool) -> None:
        self.base = base
        self._words = {width: words[: len(words) // width * width].view(t) for width, t in _UNSIGNED.items()}
        self.history = History(places, order) if races else None

    def locate(self, access: Access, size: int) -> Array:
        """Return the first place of each access, after checks of its bounds and alignment."""
        raise NotImplementedError

    def load(self, access: Access, width: int, count: int, *, read_only: bool = False) -> list[Array]:
        """Return `count` adjacent words of `width` bytes for each lane."""
        places = _all_places(self.locate(access, width * count), width * count)
        if self.history is not None:
            self._check_read(access, places, read_only)
        index = (access.addresses - self.base) // width
        return [self._words[width][index + k] for k in range(count)]

    def store(self, access: Access, values: Sequence[Array]) -> None:
        """Store adjacent words of each lane."""
        width = values[0].itemsize
        places = self._places_to_write(access, width * len(values))
        del places
        index = (access.addresses - self.base) // width
        for k, value in enumerate(values):
            self._words[width][index + k] = value

    def _places_to_write(self, access: Access, size: int) -> Array:
        places = _all_places(self.locate(access, size), size)
        if self.history is not None:
            n = places.shape[1]
            races = self.history.write(places.ravel(), np.repeat(access.warps, n))
            if len(races):
                raise FaultError(
                    int(races[0]) // n, "a race: the place is accessed by another warp, and nothing orders the two"
                )
        return places

    def _check_read(self, access: Access, places: Array, read_only: bool) -> None:
        assert self.history is not None
        if read_only and (self.history.writer[places] != NONE).any():
            lane = int(np.flatnonzero((self.history.writer[places] != NONE).any(axis=1))[0])
            raise FaultError(lane, "a load as constant (.nc) of a place that this launch has written")
        warps = access.warps
        each = 1
        if len(warps) % 32 == 0:  # lanes of a warp that read one place count once
            per_warp = places[:, 0].reshape(-1, 32), warps.reshape(-1, 32)
            if all((x == x[:, :1]).all() for x in per_warp):
                each, places, warps = 32, places[::32], warps[::32]
        n = places.shape[1]
        races = self.history.read(places.ravel(), np.repeat(warps, n))
        if len(races):
            raise FaultError(
                int(races[0]) // n * each, "a race: another warp has written the place, and nothing orders the two"
            )


class GlobalMemory(Memory):
    def __init__(self, regions: Sequence[Region], order: Order, *, races: bool, delays: bool) -> None:
        merged = _merged(regions)
        self._names = [region.name for region in merged]
        self._starts = np.array([region.address for region in merged], np.int64)
        self._ends = np.array([region.address + region.size for region in merged], np.int64)
        counts = (self._ends + PLACE - 1) // PLACE - self._starts // PLACE
        # The first place of a region, less its address in places.
        self._shift = np.cumsum(counts) - counts - self._starts // PLACE
        base = int(self._starts[0]) // 16 * 16 if merged else 0
        size = (int(self._ends[-1]) - base + 15) // 16 * 16 if merged else 16
        # The array spans all regions and what lies between them; only checked addresses are used.
        words = (
            np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8) if merged else np.zeros(16, np.uint8)
        )
        super().__init__(words, base, int(counts.sum()), order, races=races)
        self._order = order
        self._delays = delays
        self._owner = np.full(int(counts.sum()), NONE, np.int32)  # the block that has stored and not published
        self._unpublished = np.zeros(int(counts.sum()), np.uint16)
        self._stores: dict[int, list[tuple[Array, Array, Array, Array]]] = {}

    def locate(self, access: Access, size: int) -> Array:
        addresses = access.addresses
        region = np.searchsorted(self._starts, addresses, "right") - 1
        misaligned = addresses % size != 0
        if misaligned.any():
            lane = int(np.flatnonzero(misaligned)[0])
            address = int(addresses[lane])
            raise FaultError(
                lane, f"misaligned: {size} bytes at {self._describe(address)}, {address % size} past a multiple"
            )
        outside = (region < 0) | (addresses + size > self._ends[region])
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            raise FaultError(lane, f"out of bounds: {size} bytes at {self._describe(int(addresses[lane]))}")
        return addresses // PLACE + self._shift[region]

    def _describe(self, address: int) -> str:
        region = int(np.searchsorted(self._starts, address, "right")) - 1
        if region < 0:
            return f"{address:#x}, before all regions"
        offset, size = address - int(self._starts[region]), int(self._ends[region] - self._starts[region])
        return f"byte {offset} of {self._names[region]}, which has {size}"

    def load(self, access: Access, width: int, count: int, *, read_only: bool = False) -> list[Array]:
        values = super().load(access, width, count, read_only=read_only)
        if not any(self._stores.values()):
            return values
        places = _all_places(self.locate(access, width * count), width * count)
        own = self._owner[places] == access.blocks[:, None]
        if not own.any():
            return values
        raw = np.stack(values, axis=1).view(np.uint16)
        raw[own] = self._unpublished[places[own]]
        return list(raw.view(values[0].dtype).T)

    def store(self, access: Access, values: Sequence[Array]) -> None:
        if not self._delays:
            return super().store(access, values)
        width = values[0].itemsize
        places = self._places_to_write(access, width * len(values))
        n = places.shape[1]
        self._owner[places] = access.blocks[:, None]
        self._unpublished[places] = np.stack(values, axis=1).view(np.uint16)
        index = _all_places((access.addresses - self.base) // PLACE, width * len(values)).ravel()
        for block in np.unique(access.blocks):
            own = np.repeat(access.blocks == block, n)
            warps = np.repeat(access.warps, n)[own]
            entry = places.ravel()[own], index[own], warps, self._order.clocks(warps)
            self._stores.setdefault(int(block), []).append(entry)
        return None

    def publish(self, block: int, warp: int | None = None) -> None:
        """Show a block's stores to all others: those that a fence of this warp follows, or all."""
        left = []
        for places, index, warps, clocks in self._stores.pop(block, ()):
            seen = np.full(len(places), True) if warp is None else self._order.before(warps, clocks, np.int32(warp))
            now = seen & (self._owner[places] == block)
            self._words[PLACE][index[now]] = self._unpublished[places[now]]
            self._owner[places[now]] = NONE
            if not seen.all():
                left.append((places[~seen], index[~seen], warps[~seen], clocks[~seen]))
        if left:
            self._stores[block] = left

    def exchange(self, access: Access, lane: int, width: int) -> tuple[Array, int, int]:
        """Return the words, the index and the place of an atomic of one lane, after its checks."""
        one = Access(*(x[lane : lane + 1] for x in access))
        try:
            place = int(self.locate(one, width)[0])
        except FaultError as fault:
            raise FaultError(lane, str(fault)) from None
        if self.history is not None and self.history.unordered_write(place, int(one.warps[0])):
            raise FaultError(
                lane, "a race: another warp has written the place of an atomic, and nothing orders the two"
            )
        if self._owner[place] == one.blocks[0]:
            self.publish(int(one.blocks[0]))
        return self._words[width], (int(one.addresses[0]) - self.base) // width, place


class SharedMemory(Memory):
    """The shared memory of all blocks, one after another. Addresses begin at 0 in every block."""

    def __init__(self, blocks: int, size: int, order: Order, *, races: bool) -> None:
        self._size, self._room = size, max(-(-size // 16) * 16, 16)
        super().__init__(
            np.full(blocks * self._room, 0xA5, np.uint8), 0, blocks * self._room // PLACE, order, races=races
        )

    def in_block(self, access: Access) -> Access:
        """Return the access with addresses that count from the first block's memory on."""
        return access._replace(addresses=access.addresses + access.blocks.astype(np.int64) * self._room)

    def locate(self, access: Access, size: int) -> Array:
        addresses = access.addresses % self._room
        block = access.addresses // self._room
        misaligned = addresses % size != 0
        if misaligned.any():
            lane = int(np.flatnonzero(misaligned)[0])
            raise FaultError(lane, f"misaligned: {size} bytes at byte {int(addresses[lane])} of shared memory")
        outside = (addresses + size > self._size) | (block != access.blocks)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            own = int(access.addresses[lane]) - int(access.blocks[lane]) * self._room
            raise FaultError(
                lane, f"out of bounds: {size} bytes at byte {own} of shared memory, which has {self._size}"
            )
        return access.addresses // PLACE


def _all_places(first: Array, size: int) -> Array:
    count = max(size // PLACE, 1)
    return first[:, None] + np.arange(count)


def _merged(regions: Sequence[Region]) -> list[Region]:
    """Return the regions in the order of their addresses, with those that overlap in one."""
    merged: list[Region] = []
    for region in sorted(r for r in regions if r.size):
        if merged and region.address < merged[-1].address + merged[-1].size:
            last = merged.pop()
            end = max(last.address + last.size, region.address + region.size)
            name = last.name if region.name in last.name.split(", ") else f"{last.name}, {region.name}"
            region = Region(last.address, end - last.address, name)
        merged.append(region)
    return merged
