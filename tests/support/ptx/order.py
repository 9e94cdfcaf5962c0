"""Which accesses are ordered: vector clocks of warps, and the last accesses of every place in memory.

A warp's own accesses are ordered, as its lanes run together. A barrier orders the accesses of a block's warps. Between
blocks, the writer needs a fence and then an atomic, or an atomic that releases, and the reader an atomic that acquires,
or an atomic and then a fence. A barrier may stand between these two, and the fence be another warp's of the block, if
the fence is sequentially consistent, as membar.gl is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NONE, MANY = -1, -2


class Order:
    """A clock for each warp, and what each warp has seen of the others' clocks."""

    def __init__(self, warps: int, warps_of_block: int, *, replicas: bool) -> None:
        self.replicas = replicas
        self._warps_of_block = warps_of_block
        self.seen = np.zeros((warps, warps), np.int32)
        np.fill_diagonal(self.seen, 1)
        self._released: dict[int, Array] = {}  # what the last fence of a warp has published
        self._pending: dict[int, Array] = {}  # what a warp's next fence makes visible to it
        # The same for a sequentially consistent fence (membar.gl), after another warp's atomic and a barrier.
        self._passed_on: dict[int, Array] = {}
        self._places: dict[int, Array] = {}  # what an atomic at a place makes visible to later ones

    def clocks(self, warps: Array) -> Array:
        return self.seen[warps, warps]

    def one_block(self, a: Array, b: Array) -> Array:
        return a // self._warps_of_block == b // self._warps_of_block

    def before(self, earlier: Array, clocks: Array, now: Array) -> Array:
        """Return True where an access of warp `earlier` at its clock comes before what warp `now` does."""
        return (earlier == now) | (clocks <= self.seen[now, earlier])

    def barrier(self, warps: Array) -> None:
        """Order the accesses of these warps before the barrier and those after it."""
        self.seen[warps] = self.seen[warps].max(axis=0)
        self.seen[warps, warps] += 1
        known = [of[w] for w in warps.tolist() for of in (self._pending, self._passed_on) if w in of]
        if known:
            self._passed_on |= dict.fromkeys(warps.tolist(), np.max(known, axis=0))

    def fence(self, warp: int, *, sequential: bool) -> None:
        seen = self.seen[warp]
        np.maximum(seen, self._pending.get(warp, 0), out=seen)
        if sequential:
            np.maximum(seen, self._passed_on.get(warp, 0), out=seen)
        self._released[warp] = seen.copy()
        seen[warp] += 1

    def atomic(self, warp: int, place: int, *, acquires: bool, releases: bool) -> None:
        seen, there = self.seen[warp], self._places.setdefault(place, np.zeros(len(self.seen), np.int32))
        if acquires:
            np.maximum(seen, there, out=seen)
        else:
            self._pending[warp] = np.maximum(there, self._pending.get(warp, 0))
        if releases:
            np.maximum(there, seen, out=there)
            seen[warp] += 1
        elif warp in self._released:
            np.maximum(there, self._released[warp], out=there)


class History:
    """The last write of every place, and the reads since then. `read` and `write` return races as indices.

    Triton loads an element in several warps of a block where its layout has replicas, and scalars in all of them. One
    warp then stores the new value, and the others drop theirs. With `order.replicas`, such reads are no races: those of
    the block of a warp that has itself read the place before it wrote.
    """

    def __init__(self, places: int, order: Order) -> None:
        self._order = order
        self.writer = np.full(places, NONE, np.int32)
        self._written = np.zeros(places, np.int32)  # at this clock of the writer
        self._reader = np.full(places, NONE, np.int32)
        self._read = np.zeros(places, np.int32)
        self._updated = np.zeros(places, bool)  # True if the writer had read the place before
        self._rows: dict[int, int] = {}  # of places that several warps have read
        self._readers = np.zeros((0, len(order.seen)), np.int32)  # a clock for every warp; 0: it has not read

    def read(self, places: Array, warps: Array) -> Array:
        """Note reads. Return the indices of those that race with an earlier write."""
        writer = self.writer[places]
        races = (writer != NONE) & ~self._order.before(writer, self._written[places], warps)
        if self._order.replicas:
            races &= ~(self._updated[places] & self._order.one_block(writer, warps))
        clocks = self._order.clocks(warps)
        reader = self._reader[places]
        single = (reader != MANY) & ((reader == NONE) | self._order.before(reader, self._read[places], warps))
        before = reader, self._read[places]
        self._reader[places[single]] = warps[single]
        self._read[places[single]] = clocks[single]
        # Several warps of this access may read one place.
        others = np.flatnonzero(~single | (self._reader[places] != warps))
        if len(others):
            self._note_many(places, warps, clocks, np.flatnonzero(np.isin(places, places[others])), before)
        return np.flatnonzero(races)

    def _note_many(self, places: Array, warps: Array, clocks: Array, which: Array, before: tuple[Array, Array]) -> None:
        unique, first, inverse = np.unique(places[which], return_index=True, return_inverse=True)
        new = [int(p) for p in unique if int(p) not in self._rows]
        if new:
            start = len(self._readers)
            self._rows |= {p: start + k for k, p in enumerate(new)}
            self._readers = np.vstack([self._readers, np.zeros((len(new), self._readers.shape[1]), np.int32)])
        rows = np.array([self._rows[int(p)] for p in unique])
        reader, clock = before[0][which[first]], before[1][which[first]]
        one = reader >= 0
        self._readers[rows[one], reader[one]] = clock[one]
        self._readers[rows[inverse], warps[which]] = clocks[which]
        self._reader[unique] = MANY

    def write(self, places: Array, warps: Array) -> Array:
        """Note writes. Return the indices of those that race with an earlier access, or with each other."""
        writer, reader = self.writer[places], self._reader[places]
        races = (writer != NONE) & ~self._order.before(writer, self._written[places], warps)
        updated = (reader == warps) | ((writer == warps) & self._updated[places])
        unseen = (reader >= 0) & ~self._order.before(reader, self._read[places], warps)
        if self._order.replicas:
            unseen &= ~(updated & self._order.one_block(reader, warps))
        races |= unseen
        for k in np.flatnonzero(reader == MANY):
            races[k] |= self._races_with_many(int(places[k]), int(warps[k]))
            updated[k] |= self._readers[self._rows[int(places[k])], warps[k]] > 0
        for k in np.flatnonzero(reader == MANY):
            self._readers[self._rows[int(places[k])]] = 0
        self._updated[places] = updated
        self.writer[places] = warps
        self._written[places] = self._order.clocks(warps)
        self._reader[places] = NONE
        races |= self.writer[places] != warps
        return np.flatnonzero(races)

    def _races_with_many(self, place: int, warp: int) -> bool:
        clocks = self._readers[self._rows[place]]
        unseen = np.flatnonzero(clocks > self._order.seen[warp])
        unseen = unseen[unseen != warp]
        if self._order.replicas and clocks[warp] > 0:
            unseen = unseen[~self._order.one_block(unseen, np.int32(warp))]
        return len(unseen) > 0

    def unordered_write(self, place: int, warp: int) -> bool:
        """Return True if an earlier plain write of a place is not ordered before what this warp does."""
        writer = int(self.writer[place])
        return writer not in (NONE, warp) and int(self._written[place]) > int(self._order.seen[warp, writer])
