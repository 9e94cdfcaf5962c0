"""This module times fused against unfused SAM in one process: the same network, data and steps, in alternate blocks.

Both start from the same weights and get the same batches. The cost of a block is the median of its steps. The report
gives the median and the quartiles over blocks, and over neighbouring blocks' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from fused_sam.sam import SAM

from .data import CLASSES, Part, Task
from .model import mlp
from .training import MOMENTUM, Clock, Trial, batches, step
from .unfused import UnfusedSAM

ROUNDS = 15
STEPS = 10  # per block


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
    """Holds seconds per step, and ratios of unfused to fused."""

    backend: str
    fused_optimizer: Spread
    fused_step: Spread
    unfused_optimizer: Spread
    unfused_step: Spread
    optimizer_ratio: Spread
    step_ratio: Spread


def compare(task: Task, trial: Trial, batch_size: int, backend: str) -> Versus:
    """Time both with the learning rate and rho of the trial."""
    models = [mlp(task.train.x.shape[1], CLASSES, seed=0) for _ in range(2)]
    lr, rho = trial.lr, trial.rho or 0.0
    fused = SAM(models[0].parameters(), torch.optim.SGD, rho=rho, backend=backend, lr=lr, momentum=MOMENTUM)
    unfused = UnfusedSAM(models[1].parameters(), rho=rho, lr=lr, momentum=MOMENTUM)
    peers: list[tuple[nn.Module, SAM | UnfusedSAM]] = [(models[0], fused), (models[1], unfused)]
    streams = [_endless(task.train, batch_size) for _ in peers]

    blocks: list[list[Clock]] = [[], []]
    for round_ in range(-1, ROUNDS):  # the first round warms up
        for i in (0, 1) if round_ % 2 else (1, 0):
            model, optimizer = peers[i]
            clocks = [step(model, optimizer, batch)[1] for batch in islice(streams[i], STEPS)]
            if round_ >= 0:
                blocks[i].append(Clock.median(clocks))
    pairs = list(zip(*blocks, strict=True))
    return Versus(
        backend=fused.backend,
        fused_optimizer=Spread.of([f.optimizer for f, _ in pairs]),
        fused_step=Spread.of([f.total for f, _ in pairs]),
        unfused_optimizer=Spread.of([u.optimizer for _, u in pairs]),
        unfused_step=Spread.of([u.total for _, u in pairs]),
        optimizer_ratio=Spread.of([u.optimizer / f.optimizer for f, u in pairs]),
        step_ratio=Spread.of([u.total / f.total for f, u in pairs]),
    )


def _endless(part: Part, size: int) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from batches(part, size, generator)
