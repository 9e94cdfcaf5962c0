"""Interleaved rounds: each takes every turn once, in another order, so that a slow moment affects all alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bench.clock import Clock, quiet
from bench.stats import Samples

MIN_ROUNDS, MAX_ROUNDS = 15, 200
PATIENCE, FEWEST_ROUNDS = 4, 5  # after this many times its seconds, as on a busy machine, it ends with fewer
TURN_SECONDS = 2e-3  # a turn repeats short steps this long, so that caches and branch predictors settle

Turn = Sequence[Callable[[], object]]
Progress = Callable[[float], None]


def no_progress(fraction: float) -> None:
    """Show nothing."""


def interleave(
    turns: Mapping[str, Turn],
    clock: Clock,
    rounds: int | None = None,
    seconds: float = 20.0,
    progress: Progress = no_progress,
    repeats: int | None = None,
) -> dict[str, Samples]:
    """Return the seconds [rounds, phases] of every turn, which runs its phases in order.

    There are `rounds` rounds, or as many as fit into `seconds`. In each, a turn is repeated `repeats` times, or as
    often as it takes to settle, and every phase's median counts. Processes that work together must name both.
    """
    with quiet():
        often = {name: repeats or settled(turn, clock) for name, turn in turns.items()}
        samples: dict[str, list[Samples]] = {name: [] for name in turns}
        started, done = time.perf_counter(), 0
        while not finished(done, rounds, time.perf_counter() - started, seconds):
            for name in random.Random(done).sample(list(turns), len(turns)):
                samples[name].append(take_turn(turns[name], often[name], clock))
            done += 1
            spent = time.perf_counter() - started
            progress(done / rounds if rounds else max(spent / seconds, done / MAX_ROUNDS))
    return {name: np.stack(values) for name, values in samples.items()}


def settled(turn: Turn, clock: Clock) -> int:
    """Run a few turns; return how often one repeats its phases."""
    took = min(float(take_turn(turn, 1, clock).sum()) for _ in range(3))
    return max(1, min(100, math.ceil(TURN_SECONDS / max(took, 1e-9))))


def take_turn(turn: Turn, repeats: int, clock: Clock) -> Samples:
    """Return the seconds [phases], each the median over the repeats."""
    clock.mark()
    for _ in range(repeats):
        for phase in turn:
            phase()
            clock.mark()
    return np.median(np.array(clock.seconds()).reshape(repeats, len(turn)), axis=0)


def finished(done: int, rounds: int | None, spent: float, seconds: float) -> bool:
    if rounds is not None:
        return done >= rounds
    enough = MIN_ROUNDS if spent < PATIENCE * seconds else FEWEST_ROUNDS
    return done >= MAX_ROUNDS or (done >= enough and spent >= seconds)
