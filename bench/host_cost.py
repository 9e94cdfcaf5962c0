"""The host time of a step regardless of the tensors' size, with 10 to 10,000 tensors."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bench.clock import quiet
from bench.hyper import Hyper
from bench.peers import Peer
from bench.side_by_side import build
from bench.stats import Line, Samples, Summary, fit_line, summary

COUNTS = (10, 30, 100, 161, 300, 1000, 3000, 10000)
# The time outside the kernels is taken on small tensors, and on real ones, whose kernels leave the caches cold.
BESIDE = ("161x1", "resnet50")
KERNELS = ("norm", "perturb", "sgd", "adam", "lion", "restore")  # methods of the compiled module's Table


@dataclass(frozen=True)
class HostCost:
    """Seconds per step by number of one-element tensors, the line through them, and the time outside the kernels."""

    peer: str
    counts: list[int]
    steps: list[Summary]
    line: Line
    beside_kernels: dict[str, Summary]  # by shape; empty if the kernels do not run inside the call

    def at(self, count: int) -> float:
        """Return the median step in seconds at one of the counts."""
        return self.steps[self.counts.index(count)].median

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    peer: str,
    device: torch.device,
    hyper: Hyper,
    rounds: int = 40,
    counts: tuple[int, ...] = COUNTS,
    shapes: tuple[str, ...] = BESIDE,
    progress: Callable[[float], None] = lambda fraction: None,
) -> HostCost:
    """Time steps of one-element tensors, whose kernels do almost nothing, in rounds over all counts."""
    steppers = [build([peer], f"{count}x1", device, hyper)[peer][0] for count in counts]
    for stepper in steppers * 2:
        host_seconds(stepper, device)
    samples = np.empty((rounds, len(counts)))
    with quiet():
        for done in range(rounds):
            for column, stepper in enumerate(steppers):
                repeats = [host_seconds(stepper, device) for _ in range(5)]
                samples[done, column] = np.median(repeats)
            progress((done + 1) / rounds)
    steps = [summary(column) for column in samples.T]
    line = fit_line(np.array(counts, dtype=float), np.array([step.median for step in steps]))
    outside = {shape: beside_kernels(peer, shape, hyper, 5 * rounds) for shape in shapes if peer == "ours-cpu"}
    return HostCost(peer, list(counts), steps, line, outside)


def host_seconds(stepper: Peer, device: torch.device) -> float:
    """Return how long the two calls hold the host; a GPU has nothing queued before them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter_ns()
    stepper.first_step()
    stepper.second_step()
    return (time.perf_counter_ns() - started) * 1e-9


def beside_kernels(peer: str, shape: str, hyper: Hyper, rounds: int) -> Summary:
    """Return the seconds of a CPU step that are spent outside the compiled kernels."""
    cpu = torch.device("cpu")
    stepper = build([peer], shape, cpu, hyper)[peer][0]
    outside: list[float] = []
    with kernel_stopwatch() as spent, quiet():
        for _ in range(rounds + 3):
            before = sum(spent)
            outside.append(host_seconds(stepper, cpu) - (sum(spent) - before))
    samples: Samples = np.array(outside[3:])
    return summary(samples)


@contextmanager
def kernel_stopwatch() -> Iterator[list[float]]:
    """Collect the seconds of every call into the compiled kernels."""
    table = importlib.import_module("fused_sam._cpu").Table
    spent: list[float] = []
    plain = {name: getattr(table, name) for name in KERNELS}

    def timed(kernel: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            started = time.perf_counter_ns()
            try:
                return kernel(*args, **kwargs)
            finally:
                spent.append((time.perf_counter_ns() - started) * 1e-9)

        return call

    for name, kernel in plain.items():
        setattr(table, name, timed(kernel))
    try:
        yield spent
    finally:
        for name, kernel in plain.items():
            setattr(table, name, kernel)
