"""Time marks between steps: the processor's clock, or events on the GPU's stream."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch


class Clock(Protocol):
    """A stopwatch: `mark()` records a time, and `seconds()` returns the times between the marks and clears them."""

    def mark(self) -> None: ...

    def seconds(self) -> list[float]: ...


class HostClock:
    """A clock for devices that have done the work when the call returns."""

    def __init__(self) -> None:
        self.marks: list[int] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter_ns())

    def seconds(self) -> list[float]:
        marks, self.marks = self.marks, []
        return [(after - before) * 1e-9 for before, after in pairwise(marks)]


class CudaClock:
    """A clock of the stream: host time counts only if the device waits for it."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        marks, self.marks = self.marks, []
        return [before.elapsed_time(after) * 1e-3 for before, after in pairwise(marks)]


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


@contextmanager
def quiet() -> Iterator[None]:
    """Switch garbage collection off within `with`."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
