"""This module times a step of SGD, fused SAM and unfused SAM in one process, in alternate blocks.

All start from the same weights and get the same batches. The cost of a block is the median of its steps. The report
gives the median and the quartiles over blocks, and over the ratios of blocks in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from .data import CLASSES, Part, Task
from .methods import METHODS
from .model import mlp
from .training import MOMENTUM, WEIGHT_DECAY, Clock, Optimizer, Trial, batches, make_optimizer, step
from .unfused import UnfusedSAM

ROUNDS = 15
STEPS = 20  # per block


@dataclass(frozen=True)
class Spread:
    """Holds a median and both quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the median and the quartiles of the values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Versus:
    """Holds seconds per step of "sgd", "fused" and "unfused", and ratios to SGD's whole step."""

    backend: str
    optimizer: dict[str, Spread]
    step: dict[str, Spread]
    over_sgd: dict[str, Spread]


def compare(task: Task, trial: Trial, batch_size: int, widths: Sequence[int], backend: str) -> Versus:
    """Time all three with the learning rate and rho of the trial, which is one of SAM."""
    models = {name: mlp(task.train.x.shape[1], CLASSES, 0, widths) for name in ("sgd", "fused", "unfused")}
    options = {"lr": trial.lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    fused = make_optimizer(models["fused"], trial, backend)
    optimizers: dict[str, Optimizer] = {
        "sgd": make_optimizer(models["sgd"], Trial(METHODS["sgd"], trial.lr, None), backend),
        "fused": fused,
        "unfused": UnfusedSAM(models["unfused"].parameters(), rho=trial.rho or 0.0, **options),
    }
    streams = {name: _endless(task.train, batch_size) for name in models}
    blocks: dict[str, list[Clock]] = {name: [] for name in models}
    for round_ in range(-1, ROUNDS):  # the first round warms up
        for name in sorted(models, reverse=round_ % 2 == 0):
            clocks = [step(models[name], optimizers[name], batch)[1] for batch in islice(streams[name], STEPS)]
            if round_ >= 0:
                blocks[name].append(Clock.median(clocks))
    return Versus(
        backend=getattr(fused, "backend", backend),
        optimizer={name: Spread.of([c.optimizer for c in clocks]) for name, clocks in blocks.items()},
        step={name: Spread.of([c.total for c in clocks]) for name, clocks in blocks.items()},
        over_sgd={
            name: Spread.of([a.total / b.total for a, b in zip(clocks, blocks["sgd"], strict=True)])
            for name, clocks in blocks.items()
        },
    )


def _endless(part: Part, size: int) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from batches(part, size, generator)
