"""The workers' functions of tests/test_methods_distributed.py: methods of the family on distributed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fused_sam
from fused_sam.schedule import AdaptiveSchedule

from . import family, spread

OPTIONS: dict[str, Any] = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}
# Options with which several processes and one process take equal steps. ESAM draws its mask per shard, so beta is 1.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    **family.CASES,
    "ESAM": {"ESAM": {"beta": 1.0, "gamma": 1.0}},
    "LookSAM": {"LookSAM": {"k": 2}},
    "MicrobatchSAM": {},
}
METHODS: dict[str, Callable[..., Any]] = {
    **family.cases({**fused_sam.METHODS, **family.EXAMPLES}, CASES),
    "adaptive schedule": lambda p, **o: fused_sam.SAM(p, schedule=AdaptiveSchedule(5), **o),
}


def train(rank: int, method: str, way: str | None) -> tuple[list[Tensor], list[Any]]:
    """Return the weights after five steps, and which steps perturbed. `way` None is one process with all data."""
    spread_model, parts = spread.WAYS[way] if way else (lambda model: model, 1)
    model: nn.Module = spread_model(spread.model_of())
    optimizer = METHODS[method](spread.groups_of(model), **OPTIONS)
    perturbed = []
    for step in range(5):
        batch = spread.batch_of(step)
        part = spread.part_of(batch, rank, parts) if way else batch
        optimizer.zero_grad()
        spread.loss_of(model, part).backward()
        perturbed.append(optimizer.needs_second_pass)
        if perturbed[-1]:
            optimizer.first_step(zero_grad=True)
            spread.loss_of(model, part).backward()
        optimizer.step()
    family.clean(optimizer)
    return [spread.full(p) for p in model.parameters()], perturbed
