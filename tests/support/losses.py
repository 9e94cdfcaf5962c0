"""Losses that differ between the passes, as formulas: their derivatives by the outputs, in float64, number by number.

Nothing here comes from the package or from torch's losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam import SAM
from fused_sam.training import losses, sam_step

from . import spread

Rows = list[list[float]]
Derivative = Callable[[Rows, list[int], Rows], Rows]  # of outputs, targets and the first pass's outputs


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z - max(row)) for z in row]
    return [x / sum(powers) for x in powers]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-z)) for z in row]


def cross_entropy(z: Rows, y: list[int], _: Rows) -> Rows:
    """(softmax(z) - y) / B."""
    return [[(p - (k == t)) / len(z) for k, p in enumerate(softmax(row))] for row, t in zip(z, y, strict=True)]


def binary_cross_entropy(z: Rows, y: list[int], _: Rows) -> Rows:
    """(sigmoid(z) - y) / B, summed over classes."""
    return [[(p - (k == t)) / len(z) for k, p in enumerate(sigmoid(row))] for row, t in zip(z, y, strict=True)]


def forgetting(c: float, gamma: float, activation: Callable[[list[float]], list[float]]) -> Derivative:
    """(1/K - a p - (1 - a) y) / B,  a = gamma max(0, (1 - 1 / (C p_y)) / (1 - 1 / C))."""

    def derivative(z: Rows, y: list[int], _: Rows) -> Rows:
        rows = []
        for row, t in zip(z, y, strict=True):
            p = activation(row)
            a = gamma * max(0.0, (1 - 1 / (c * p[t])) / (1 - 1 / c))
            rows.append([(1 / len(row) - a * p[k] - (1 - a) * (k == t)) / len(z) for k in range(len(row))])
        return rows

    return derivative


def functional(z: Rows, y: list[int], first: Rows) -> Rows:
    """The derivative of the cross-entropy at the first pass's outputs."""
    return cross_entropy(first, y, first)


def divergence(z: Rows, y: list[int], first: Rows) -> Rows:
    """(softmax(z) - softmax(first)) / B."""
    pairs = zip(z, first, strict=True)
    return [[(p - q) / len(z) for p, q in zip(softmax(a), softmax(b), strict=True)] for a, b in pairs]


def distillation(weight: float, temperature: float) -> Derivative:
    """Cross-entropy's, and weight T times (softmax(z / T) - softmax(first / T)) / B."""

    def derivative(z: Rows, y: list[int], first: Rows) -> Rows:
        scaled = ([[v / temperature for v in row] for row in rows] for rows in (z, first))
        terms = divergence(next(scaled), y, next(scaled))
        return [
            [a + weight * temperature * b for a, b in zip(*rows, strict=True)]
            for rows in zip(cross_entropy(z, y, first), terms, strict=True)
        ]

    return derivative


def backward(
    model: nn.Module, batch: tuple[Tensor, Tensor], derivative: Derivative, first: Rows | None = None
) -> Rows:
    """Add the gradient of a loss with this derivative; return the outputs."""
    outputs = model(batch[0])
    rows = outputs.tolist()
    outputs.backward(torch.tensor(derivative(rows, batch[1].tolist(), first or rows), dtype=outputs.dtype))
    return rows


class Case:
    """A loss of the package, with the derivatives of the ordinary loss and of both passes."""

    def __init__(self, make: Callable[[SAM], Any], ordinary: Derivative, first: Derivative, second: Derivative) -> None:
        self.make, self.ordinary, self.first, self.second = make, ordinary, first, second


OBF = losses.OutputBiasForgetting
CASES: dict[str, Case] = {
    "OBF": Case(OBF, binary_cross_entropy, forgetting(1000, 1.0, sigmoid), binary_cross_entropy),
    "OBF softmax": Case(
        lambda o: OBF(o, C=4.0, gamma=0.7, activation="softmax"),
        cross_entropy, forgetting(4, 0.7, softmax), cross_entropy,
    ),
    "OBF lambda 0": Case(
        lambda o: OBF(o, C=math.inf, gamma=0.3, criterion=nn.functional.cross_entropy),
        cross_entropy, forgetting(1e300, 0.3, sigmoid), cross_entropy,
    ),
    "Functional": Case(losses.Functional, cross_entropy, cross_entropy, functional),
    "SelfDistillation": Case(
        lambda o: losses.SelfDistillation(o, weight=0.6, temperature=1.7),
        cross_entropy, cross_entropy, distillation(0.6, 1.7),
    ),
}  # fmt: skip


def train_spread(rank: int, name: str, way: str | None) -> list[Tensor]:
    """Return the weights after four steps of sam_step(). `way` None is one process with the whole batch."""
    distribute, parts = spread.WAYS[way] if way else (lambda model: model, 1)
    model: nn.Module = distribute(spread.model_of())
    optimizer = SAM(spread.groups_of(model), rho=0.3, lr=0.1, momentum=0.9)
    released = losses.ReleasedSADT(optimizer) if name == "ReleasedSADT" else None
    loss = None if released else CASES[name].make(optimizer)
    for step in range(4):
        batch = spread.batch_of(step)
        part = spread.part_of(batch, rank, parts) if way else batch
        if released:
            released.step(model, part, microbatches=2)
        else:
            sam_step(model, loss, part, optimizer, microbatches=2)
    return [spread.full(p) for p in model.parameters()]
