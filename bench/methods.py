"""The time of a training step of every method over SGD's, on networks whose passes outweigh the optimizer's work.

A turn is ten steps, a whole period of the methods that do not perturb in every step. For the tail it is a whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench import family
from bench.clock import HostClock
from bench.rounds import Progress, Turn, interleave, no_progress
from bench.stats import Ratio, Samples, Summary, ratio_of_medians, summary
from fused_sam.demo.model import mlp

STEPS = 10
CLASSES = 10
LR, BASELINE = 1e-3, "sgd"


def cnn(seed: int) -> nn.Module:
    """Return three 3 x 3 convolutions of 32, 64 and 128 channels for 3 x 32 x 32 pixels: 94,538 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for into, out, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(into, out, 3, stride, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


@dataclass(frozen=True)
class Network:
    title: str
    build: Callable[[int], nn.Module]  # takes a seed
    input: tuple[int, ...]
    batch: int


# Each takes 2 GFLOP per pass, so that the optimizer's work is small in comparison.
NETWORKS = {
    "cnn": Network("CNN, 3 convolutions, 32 x 32 pixels", cnn, (3, 32, 32), 32),
    "mlp": Network("MLP 784-512-512-10", partial(mlp, 784, CLASSES), (784,), 512),
}


@dataclass(frozen=True)
class Training:
    """Seconds per step [rounds] of every method on one network."""

    network: str
    parameters: int
    batch: int
    steps: dict[str, Samples]

    def step(self, method: str) -> Summary:
        return summary(self.steps[method])

    def ratio(self, method: str) -> Ratio:
        """Return the ratio to a step of SGD."""
        return ratio_of_medians(self.steps[method], self.steps[BASELINE])

    def as_json(self) -> dict[str, Any]:
        methods = {
            name: {
                "label": family.METHODS[name].label,
                "step": asdict(self.step(name)),
                "ratio": asdict(self.ratio(name)),
                "target": family.METHODS[name].target,
            }
            for name in self.steps
        }
        return {"network": self.network, "parameters": self.parameters, "batch": self.batch, "methods": methods}


def measure(
    network: str, methods: Sequence[str], rounds: int, batch: int = 0, progress: Progress = no_progress
) -> Training:
    """Time `rounds` interleaved rounds. They always include SGD, and never SGD with twice the epochs."""
    entry = NETWORKS[network]
    size = batch or entry.batch
    names = list(dict.fromkeys([BASELINE, *(name for name in methods if family.METHODS[name].stretch == 1)]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, *entry.input, generator=generator)
    y = torch.randint(CLASSES, (size,), generator=generator)
    turns: dict[str, Turn] = {}
    for name in names:
        model = entry.build(0)
        optimizer = family.METHODS[name].build(model.parameters(), STEPS, lr=LR)
        turns[name] = [partial(ten_steps, model, optimizer, x, y)]
        turns[name][0]()  # makes state and plans, and lets threads settle
    samples = interleave(turns, HostClock(), rounds, progress=progress, repeats=1)
    parameters = sum(param.numel() for param in entry.build(0).parameters())
    return Training(network, parameters, size, {name: seconds[:, 0] / STEPS for name, seconds in samples.items()})


def ten_steps(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    family.rewind(optimizer)
    for _ in range(STEPS):
        family.step(model, optimizer, x, y)
