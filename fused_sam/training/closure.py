"""A closure for optimizer.step(closure) can make its second run a pass like the first.

    optimizer.step(paired_closure(closure, model, optimizer))
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from torch import nn

from fused_sam.sam import SAM

from .batch_norm import frozen_batch_norm
from .rng import ReplayedRNG

T = TypeVar("T")


def paired_closure(closure: Callable[[], T], model: nn.Module, optimizer: SAM) -> Callable[[], T]:
    """Return `closure` with frozen batch norm and the first run's dropout masks while the weights are perturbed.

    Use it with frameworks that call optimizer.step(closure), and make one per step. If the first gradient was computed
    before the step, there is no first run, and so no masks that the second run could replay.
    """
    rng: ReplayedRNG | None = None

    def run() -> T:
        nonlocal rng
        if optimizer.perturbed:
            with frozen_batch_norm(model), rng or nullcontext():
                return closure()
        rng = ReplayedRNG.of(model)
        return closure()

    return run
