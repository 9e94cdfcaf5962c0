"""This module makes one training run, and measures its losses, accuracies and times.

    loss.backward();  first_step();  loss.backward();  second_step()        (SGD: loss.backward();  step())

Every optimizer gets the same network, batches, momentum and weight decay. The learning rate stays constant, so that the
curve of a run is also the curve of every shorter run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam.sam import SAM

from .data import CLASSES, Part, Task
from .methods import Method
from .model import mlp
from .unfused import UnfusedSAM

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

Optimizer = torch.optim.SGD | SAM | UnfusedSAM


@dataclass(frozen=True)
class Trial:
    """Holds the options of a run."""

    method: Method
    lr: float
    rho: float | None  # None: not SAM

    def __str__(self) -> str:
        rho = "" if self.rho is None else f", rho {self.rho:g}"
        return f"{self.method.label}, lr {self.lr:g}{rho}"


@dataclass(frozen=True)
class Curve:
    """Holds one value per epoch of each measured quantity."""

    passes: list[int]  # gradient passes over the training data so far
    train_loss: list[float]  # mean over the epoch, noisy labels, at the unperturbed weights
    test_loss: list[float]
    test_accuracy: list[float]  # clean labels
    validation_accuracy: list[float]  # noisy labels


@dataclass(frozen=True)
class Clock:
    """Holds the duration of a step in seconds."""

    total: float
    optimizer: float  # in the optimizer's calls, which also clear the gradients

    @staticmethod
    def median(clocks: Sequence[Clock]) -> Clock:
        """Return the median of each duration."""
        return Clock(statistics.median(c.total for c in clocks), statistics.median(c.optimizer for c in clocks))


@dataclass(frozen=True)
class Run:
    """Holds what one training run measured."""

    trial: Trial
    seed: int
    curve: Curve

    @property
    def test_accuracy(self) -> float:
        """The accuracy on clean labels after the last epoch."""
        return self.curve.test_accuracy[-1]

    @property
    def validation_accuracy(self) -> float:
        """The accuracy on noisy validation labels after the last epoch."""
        return self.curve.validation_accuracy[-1]

    @property
    def best_epoch(self) -> int:
        """The index of the epoch that early stopping takes: the first of the highest validation accuracy."""
        return self.curve.validation_accuracy.index(max(self.curve.validation_accuracy))

    @property
    def stopped_accuracy(self) -> float:
        """The accuracy on clean labels after the epoch that early stopping takes."""
        return self.curve.test_accuracy[self.best_epoch]


def make_optimizer(model: nn.Module, trial: Trial, backend: str) -> torch.optim.SGD | SAM:
    """Return the optimizer of a trial."""
    if trial.rho is None:
        return torch.optim.SGD(model.parameters(), lr=trial.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=trial.rho,
        backend=backend,
        lr=trial.lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )


def step(model: nn.Module, optimizer: Optimizer, batch: Part) -> tuple[Tensor, Clock]:
    """Make one step on a batch. Return the loss of the weights before it, detached, and the duration."""
    start = perf_counter()
    loss = cross_entropy(model(batch.x), batch.y)
    loss.backward()
    ascent_start = ascent_end = perf_counter()
    if isinstance(optimizer, SAM | UnfusedSAM):
        optimizer.first_step(zero_grad=True)
        ascent_end = perf_counter()
        cross_entropy(model(batch.x), batch.y).backward()
        descent_start = perf_counter()
        optimizer.second_step(zero_grad=True)
    else:
        descent_start = ascent_end
        optimizer.step()
        optimizer.zero_grad()
    end = perf_counter()
    return loss.detach(), Clock(end - start, ascent_end - ascent_start + end - descent_start)


def batches(part: Part, size: int, generator: torch.Generator) -> Iterator[Part]:
    """Yield the images once in batches, in a random order of the generator."""
    for index in torch.randperm(len(part), generator=generator).split(size):
        yield part[index]


@torch.no_grad()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    outputs = model(part.x)
    return cross_entropy(outputs, part.y).item(), (outputs.argmax(1) == part.y).double().mean().item()


def train(
    task: Task, trial: Trial, seed: int, *, epochs: int, batch_size: int, widths: Sequence[int], backend: str = "auto"
) -> Run:
    """Train for epochs * trial.method.stretch epochs, and evaluate after each."""
    method = trial.method
    model = mlp(task.train.x.shape[1], CLASSES, seed, widths)
    optimizer = make_optimizer(model, trial, backend)
    generator = torch.Generator().manual_seed(seed)
    curve = Curve([], [], [], [], [])
    for epoch in range(1, epochs * method.stretch + 1):
        losses = []
        for batch in batches(task.train, batch_size, generator):
            loss, _ = step(model, optimizer, batch)
            losses.append(loss * len(batch))
        test_loss, test_accuracy = evaluate(model, task.test)
        curve.passes.append(epoch * method.passes)
        curve.train_loss.append(torch.stack(losses).sum().item() / len(task.train))
        curve.test_loss.append(test_loss)
        curve.test_accuracy.append(test_accuracy)
        curve.validation_accuracy.append(evaluate(model, task.validation)[1])
    return Run(trial, seed, curve)
