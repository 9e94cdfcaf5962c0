"""A launch: the lanes of several blocks run together, in an order that a seed decides.

Of the lanes that can run, those at the lowest place of the program run up to the next branch, label, barrier, fence or
atomic. So lanes that a branch has parted meet again. Warps pause at random at the places where others may overtake
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from . import access, arithmetic, conversions
from .access import Parameters
from .errors import PtxError, UnknownOpcodeError
from .memory import GlobalMemory, Region, SharedMemory
from .operands import UNSIGNED, Names, Operation, Read, Run, mods_of, reader
from .order import Array, Order
from .parser import Instruction, Kernel, Negated, Symbol

_READY, _AT_BARRIER, _AT_WARP, _DONE = range(4)
_JUNK = 0xDEADBEEFDEADBEEF  # of registers that nothing has written
_MOST_TURNS = 1_000_000


@dataclass(frozen=True)
class Options:
    seed: int = 0  # of the order of blocks and warps
    races: bool = True  # True if races are errors
    delays: bool = True  # True if stores wait for a fence, or for the end of the launch
    replicas: bool = False  # True for Triton's kernels (order.py)
    lanes: int = 4096  # that run together


class _IncompleteWarpError(Exception):
    """Raised at an instruction that needs all lanes of a warp, with the lanes that lack others."""

    def __init__(self, lanes: Array) -> None:
        super().__init__()
        self.lanes = lanes


@dataclass
class _Step:
    """An instruction: `run` for the lanes of the guard, or control that the machine handles by its name."""

    op: Operation
    run: Run | None
    guard: Read | None
    control: str  # "", "branch", "end", "barrier", "point"
    target: int = 0

    def execute(self, m: Machine, at: Any) -> None:
        assert self.run is not None
        if self.guard is not None:
            at = m.narrow(at, self.guard(m, at))
            if at is None:
                return
        self.run(m, at)


class _Program:
    def __init__(self, kernel: Kernel) -> None:
        body, names = kernel.body, Names(kernel)
        self.widths = list(body.registers.values())
        self.shared_bytes = body.shared_bytes
        self.steps = [self._step(instruction, names) for instruction in body.instructions]
        self._leaders = {*body.labels.values()}
        self._segments: dict[int, tuple[list[Run], int]] = {}

    @staticmethod
    def _step(instruction: Instruction, names: Names) -> _Step:
        op = Operation(instruction, names)
        guard = None
        if instruction.guard is not None:
            operand = Negated(instruction.guard) if instruction.unless else instruction.guard
            guard = reader(op, operand, "pred")
        base, *mods = mods_of(op)
        if base == "bra" and mods in ([], ["uni"]):
            (label,) = op.operands
            if not isinstance(label, Symbol) or label.name not in names.labels:
                raise PtxError(f"a branch to no label: {op.text!r}")
            return _Step(op, None, guard, "branch", names.labels[label.name])
        if base in ("ret", "exit") and not mods:
            return _Step(op, None, guard, "end")
        if op.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync") and len(op.operands) == 1:
            return _Step(op, None, guard, "barrier")
        run = access.build(op) or conversions.build(op) or arithmetic.build(op)
        if run is None:
            raise UnknownOpcodeError(op.opcode)
        return _Step(op, run, guard, "point" if access.is_point(op) else "")

    def segment(self, start: int) -> tuple[list[Run], int]:
        """Return the functions of the instructions from `start` to the next control or label, and the place of that."""
        if start not in self._segments:
            end = start
            while end < len(self.steps) and not self.steps[end].control and (end == start or end not in self._leaders):
                end += 1
            runs = [s.run if s.guard is None and s.run is not None else s.execute for s in self.steps[start:end]]
            self._segments[start] = runs, end
        return self._segments[start]


_PROGRAMS: WeakKeyDictionary[Kernel, _Program] = WeakKeyDictionary()


def _program_of(kernel: Kernel) -> _Program:
    if kernel not in _PROGRAMS:
        _PROGRAMS[kernel] = _Program(kernel)
    return _PROGRAMS[kernel]


def launch(
    kernel: Kernel,
    grid: int,
    threads: int,
    arguments: bytes,
    regions: Sequence[Region],
    *,
    shared: int = 0,
    options: Options = Options(),  # frozen
) -> None:
    """Run a kernel of `grid` blocks.

    Args:
        arguments: as the kernel's parameters lie in memory.
        regions: the memory that the kernel may access. It is read and written where it is.
        shared: bytes of shared memory besides what the kernel declares.
    """
    if kernel.threads is not None and threads > kernel.threads:
        raise PtxError(f"{kernel.name} takes at most {kernel.threads} threads, not {threads}")
    if len(arguments) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.name} has {kernel.parameter_bytes} bytes of parameters, not {len(arguments)}")
    random = np.random.default_rng(options.seed)
    blocks = random.permutation(grid)
    at_once = max(options.lanes // (-(-threads // 32) * 32), 1)
    with np.errstate(all="ignore"):
        for first in range(0, grid, at_once):
            some = blocks[first : first + at_once]
            Machine(kernel, grid, some, threads, Parameters(arguments), regions, shared, options, random).run()


class Machine:
    """Some blocks of a launch, with the registers of all their lanes."""

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        blocks: Array,
        threads: int,
        parameters: Parameters,
        regions: Sequence[Region],
        shared: int,
        options: Options,
        random: np.random.Generator,
    ) -> None:
        self._kernel, self._program, self._blocks, self._threads = kernel, _program_of(kernel), blocks, threads
        self.random, self.parameters = random, parameters
        room = -(-threads // 32) * 32  # lanes of a block; those behind its threads never run
        self.lanes = np.arange(len(blocks) * room)
        self.warp_of = (self.lanes // 32).astype(np.int32)
        self.block_of = (self.lanes // room).astype(np.int32)
        self.lane_of = self.lanes % 32
        self._warps_of_block = room // 32
        self._thread_of = self.lanes % room
        self.order = Order(len(self.lanes) // 32, self._warps_of_block, replicas=options.replicas)
        self.memory = GlobalMemory(regions, self.order, races=options.races, delays=options.delays)
        size = self._program.shared_bytes + (-self._program.shared_bytes % 16 + shared if shared else 0)
        self.shared = SharedMemory(len(blocks), size, self.order, races=options.races)
        self.registers = [
            np.full(len(self.lanes), _JUNK % (1 << 8 * w), UNSIGNED[w]) if w > 1 else np.zeros(len(self.lanes), bool)
            for w in self._program.widths
        ]
        self.special = {
            f"%{name}.{axis}": np.zeros(len(self.lanes), np.uint32) for name in ("tid", "ctaid") for axis in "xyz"
        }
        self.special |= {f"%{n}.{a}": np.ones(len(self.lanes), np.uint32) for n in ("ntid", "nctaid") for a in "xyz"}
        self.special["%tid.x"], self.special["%ctaid.x"] = self._thread_of, blocks[self.block_of]
        self.special["%ntid.x"][:], self.special["%nctaid.x"][:] = threads, grid
        self.special["%laneid"] = self.lane_of
        self._place = np.zeros(len(self.lanes), np.int32)
        self._state = np.where(self._thread_of < threads, _READY, _DONE).astype(np.int8)
        self._wake = np.zeros(len(self.lanes) // 32, np.int64)  # the turn in which a warp goes on
        self._turn = 0
        self._pause(np.arange(len(self._wake)))

    # ---- what instructions need --------------------------------------------------------------------------------

    def narrow(self, at: Any, mask: Any) -> Any:
        """Return those of the lanes that the mask has; None for none."""
        if mask.all():
            return at
        lanes = self.lanes[at][mask]
        return lanes if len(lanes) else None

    def block_of_warp(self, warp: int) -> int:
        return warp // self._warps_of_block

    def require_warps(self, at: Any, members: Any) -> None:
        """Check that all lanes of `members`, a mask for each lane's warp, are among these lanes."""
        lanes = self.lanes[at]
        if len(lanes) == len(self.lanes):
            return
        bits = np.bincount(self.warp_of[at], weights=2.0 ** self.lane_of[at], minlength=len(self._wake))
        lacking = (members & ~bits.astype(np.int64)[self.warp_of[at]].astype(np.uint32)) != 0
        if lacking.any():
            raise _IncompleteWarpError(lanes[lacking])

    def where(self, at: Any, lane: int) -> str:
        """Return a name of a lane that errors print."""
        number = int(self.lanes[at][lane])
        return f"{self._kernel.name}, block {self._blocks[self.block_of[number]]}, thread {self._thread_of[number]}"

    # ---- whose turn it is --------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            at = self._next()
            if at is None:
                break
            self._turn += 1
            if self._turn > _MOST_TURNS:
                raise PtxError(f"{self._kernel.name} does not end")
            self._run_segment(int(self._place[at][0]), at)
        for block in range(len(self._blocks)):
            self.memory.publish(block)

    def _next(self) -> Any:
        """Return the lanes that run now; None if all have ended."""
        ready = self._state == _READY
        if not ready.any():
            if (self._state == _DONE).all():
                return None
            self._fail_waiting()
        awake = ready & (self._wake <= self._turn)[self.warp_of]
        if not awake.any():
            self._turn = int(self._wake[self.warp_of[ready]].min())
            return self._next()
        places = np.where(awake, self._place, len(self._program.steps))
        lanes = np.flatnonzero(places == places.min())
        return self._index(lanes)

    def _index(self, lanes: Array) -> Any:
        """Return the lanes as a slice, if they are adjacent: arrays are then not copied."""
        first, last = int(lanes[0]), int(lanes[-1])
        return slice(first, last + 1) if last - first + 1 == len(lanes) else lanes

    def _fail_waiting(self) -> None:
        waiting = np.flatnonzero((self._state == _AT_BARRIER) | (self._state == _AT_WARP))
        texts = dict.fromkeys(self._program.steps[int(p)].op.text for p in self._place[waiting])
        raise PtxError(
            f"{self.where(waiting, 0)}: threads wait at {' and at '.join(map(repr, texts))}, and others "
            "have ended or wait elsewhere"
        )

    def _pause(self, warps: Array) -> None:
        self._wake[warps] = self._turn + self.random.choice([0, 0, 0, 0, 1, 2, 5], len(warps))

    def _run_segment(self, start: int, at: Any) -> None:
        runs, end = self._program.segment(start)
        k = start
        try:
            for k, run in enumerate(runs, start):  # noqa: B007  # the place of an error
                run(self, at)
        except _IncompleteWarpError as error:
            self._wait_for_warp(k, at, error.lanes)
            return
        if end == len(self._program.steps):
            raise PtxError(f"{self._kernel.name} runs past its end")
        step = self._program.steps[end]
        if not step.control:
            self._place[at] = end
            return
        self._control(step, end, at)

    def _control(self, step: _Step, place: int, at: Any) -> None:
        if step.control == "point":
            at = self._overtaken(place, at)
            step.execute(self, at)
            self._place[at] = place + 1
            self._pause(np.unique(self.warp_of[at]))
            return
        self._place[at] = place + 1
        if step.guard is not None:
            at = self.narrow(at, step.guard(self, at))
            if at is None:
                return
        if step.control == "branch":
            self._place[at] = step.target
        elif step.control == "end":
            self._state[at] = _DONE
        else:
            self._place[at] = place
            self._arrive(at)

    def _overtaken(self, place: int, at: Any) -> Any:
        """Return those of the lanes that execute an instruction now. Other warps wait for some turns."""
        self._place[at] = place
        warps = np.unique(self.warp_of[at])
        if len(warps) == 1 or self.random.random() < 0.5:
            return at
        late = self.random.random(len(warps)) < 0.5
        late[self.random.integers(len(warps))] = False
        self._wake[warps[late]] = self._turn + self.random.integers(1, 6, int(late.sum()))
        return self.lanes[at][~np.isin(self.warp_of[at], warps[late])]

    def _wait_for_warp(self, place: int, at: Any, lacking: Array) -> None:
        self._place[at] = place
        self._state[lacking] = _AT_WARP
        for warp in np.unique(self.warp_of[lacking]):
            own = slice(32 * int(warp), 32 * int(warp) + 32)
            here = (self._state[own] == _AT_WARP) & (self._place[own] == place)
            if here.all():
                self._state[own] = _READY

    def _arrive(self, at: Any) -> None:
        self._state[at] = _AT_BARRIER
        for block in np.unique(self.block_of[at]):
            own = np.flatnonzero((self.block_of == block) & (self._state == _AT_BARRIER))
            places = np.unique(self._place[own])
            if len(places) > 1:
                self._fail_waiting()
            if len(own) == self._threads:
                self._state[own] = _READY
                self._place[own] += 1
                warps = np.unique(self.warp_of[own])
                self.order.barrier(warps)
                self._pause(warps)
