"""Losses that differ between SAM's passes on digits, 40% of which have a wrong label, and what each of them costs.

    python examples/losses.py [--epochs 30] [--samples 1000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam import SAM
from fused_sam.training import losses, sam_step


def ordinary(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


LOSSES: dict[str, tuple[float, Callable[[SAM], Any]]] = {  # rho, and the loss of an optimizer
    "SGD": (0.0, lambda optimizer: ordinary),
    "SAM": (0.5, lambda optimizer: ordinary),
    "OutputBiasForgetting": (0.2, lambda optimizer: losses.OutputBiasForgetting(optimizer, activation="softmax")),
    "Functional": (0.5, losses.Functional),
    "SelfDistillation": (0.5, lambda optimizer: losses.SelfDistillation(optimizer, weight=1.0, temperature=2.0)),
    "ReleasedSADT": (0.05, losses.ReleasedSADT),
}


def train(rho: float, make: Callable[[SAM], Any], epochs: int, samples: int) -> tuple[float, float]:
    """Train, and return the accuracy on clean test labels and the milliseconds per step."""
    task = digits(noise=0.4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    loss = make(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    x, y = task.train.x[:samples], task.train.y[:samples]
    start, steps = time.perf_counter(), 0
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            batch = x[index], y[index]
            if isinstance(loss, losses.ReleasedSADT):
                loss.step(model, batch)
            else:
                sam_step(model, loss, batch, optimizer)
            steps += 1
        scheduler.step()
    milliseconds = (time.perf_counter() - start) * 1000 / steps
    model.eval()
    with torch.no_grad():
        return (model(task.test.x).argmax(1) == task.test.y).double().mean().item(), milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, (rho, make) in LOSSES.items():
        accuracy, cost = train(rho, make, options.epochs, options.samples)
        print(f"{name}: accuracy on clean test images {accuracy:.1%}, {cost:.2f} ms per step")


if __name__ == "__main__":
    main()
