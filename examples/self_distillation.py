"""SAM with self-distillation (SADT): the second pass also learns from the first pass's predictions.

    first pass:   L(w)      = CE(f_w(x), y)
    second pass:  L(w + e)  = CE(f_{w+e}(x), y) + distill * T^2 * KL(softmax(f_w(x) / T) || softmax(f_{w+e}(x) / T))

The idea is Fahim & Boutellier's ("SADT", 2022, arXiv 2211.00310): the unperturbed weights teach the perturbed ones.
The loss is the usual one of distillation (Hinton et al., arXiv 1503.02531), T^2 included.

    python examples/self_distillation.py [--epochs 30] [--samples 1000] [--distill 1.0] [--temperature 2.0]
"""

from __future__ import annotations

import argparse

import torch
from data import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fused_sam import SAM
from fused_sam.training import sam_step


class Distilled:
    """Computes the losses of both passes; keeps the first pass's predictions for the second.

    Pass an instance to sam_step() as loss_fn, with one micro-batch per step.
    """

    def __init__(self, optimizer: SAM, distill: float, temperature: float) -> None:
        self._optimizer = optimizer
        self._distill = distill
        self._temperature = temperature
        self._teacher: Tensor | None = None

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = model(x)
        loss = cross_entropy(logits, y)
        t = self._temperature
        if not self._optimizer.perturbed:
            self._teacher = softmax(logits.detach() / t, dim=1)
            return loss
        assert self._teacher is not None
        student = log_softmax(logits / t, dim=1)
        return loss + self._distill * t**2 * kl_div(student, self._teacher, reduction="batchmean")


def train(distill: float, temperature: float, epochs: int, samples: int) -> tuple[float, float]:
    """Train, and return the accuracy and the mean cross-entropy on clean test labels."""
    task = digits(noise=0.4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss_fn = Distilled(optimizer, distill, temperature)
    x, y = task.train.x[:samples], task.train.y[:samples]
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            sam_step(model, loss_fn, (x[index], y[index]), optimizer)
        scheduler.step()
    model.eval()
    with torch.no_grad():
        logits = model(task.test.x)
        accuracy = (logits.argmax(1) == task.test.y).double().mean().item()
        return accuracy, cross_entropy(logits, task.test.y).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--distill", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, distill in ("SAM", 0.0), ("SAM with self-distillation", options.distill):
        accuracy, loss = train(distill, options.temperature, options.epochs, options.samples)
        print(f"{name}: accuracy on clean test images {accuracy:.1%}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
