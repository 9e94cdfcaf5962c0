"""The optimizers of all methods without a network: the rate at which each moves its bytes, over copy_'s rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bench import family, traffic
from bench.clock import HostClock
from bench.rounds import Progress, Turn, interleave, no_progress
from bench.shapes import by_name, numel
from bench.stats import Ratio, Samples, Summary, ratio_of_medians, summary
from bench.work import GRADIENT_SCALE, WEIGHT_SCALE, noise
from fused_sam import SAM, MicrobatchSAM

LR = 1e-3
WITHIN = 0.85  # of copy_'s rate is the target


@dataclass(frozen=True)
class Work:
    """Seconds per step [rounds] of the optimizers alone; `copy` [rounds] is one copy_ of the weights' size."""

    shape: str
    numel: int
    steps: dict[str, Samples]
    copy: Samples

    def step(self, method: str) -> Summary:
        return summary(self.steps[method])

    def floor(self, method: str) -> float:
        """Return the bytes per parameter that a step must move."""
        return family.METHODS[method].bytes or 0.0

    def rate(self, method: str) -> float:
        """Return the bytes per second that the method moves."""
        return self.floor(method) * self.numel / self.step(method).median

    def copy_fraction(self, method: str) -> Ratio:
        """Return the method's rate over copy_'s."""
        work = self.floor(method) * self.numel / traffic.copy_bytes(self.numel)
        ratio = ratio_of_medians(self.copy, self.steps[method])
        return Ratio(work * ratio.value, work * ratio.low, work * ratio.high)

    def as_json(self) -> dict[str, Any]:
        methods = {
            name: {
                "label": family.METHODS[name].label,
                "bytes": self.floor(name),
                "step": asdict(self.step(name)),
                "rate": self.rate(name),
                "copy_fraction": asdict(self.copy_fraction(name)),
            }
            for name in self.steps
        }
        return {"shape": self.shape, "numel": self.numel, "copy": asdict(summary(self.copy)), "methods": methods}


class Stepper:
    """An optimizer that gets two sets of gradients alternately, as from the two passes of a step."""

    def __init__(self, params: list[Parameter], optimizer: Optimizer, given: list[list[Tensor]]) -> None:
        self.params, self.optimizer = params, optimizer
        self.given = given  # of both passes; they are copied, because methods may change gradients
        self.copies = [[torch.empty_like(g) for g in grads] for grads in given]

    def feed(self, which: int) -> None:
        """Set fresh gradients of one of the passes."""
        torch._foreach_copy_(self.copies[which], self.given[which])
        for param, grad in zip(self.params, self.copies[which], strict=True):
            param.grad = grad

    def perturb(self) -> None:
        """Perturb if this step does; the decision is a part of its cost."""
        if isinstance(self.optimizer, SAM) and self.optimizer.needs_second_pass:
            self.optimizer.first_step()

    def update(self) -> None:
        self.optimizer.step()

    def phases(self) -> list[Callable[[], object]]:
        """Return the phases of one step; those with odd numbers are timed."""
        found: list[Callable[[], object]] = [partial(self.feed, 0), self.perturb, partial(self.feed, 1)]
        if isinstance(self.optimizer, MicrobatchSAM):
            # Later second gradients are not set, because backward() adds them to the sum in p.grad.
            for _ in range(self.optimizer.num_microbatches - 1):
                found += [self.optimizer.next_microbatch, partial(self.feed, 0), self.perturb, nothing]
        return [*found, self.update]


def nothing() -> None:
    pass


def measure(shape: str, methods: Sequence[str], rounds: int, progress: Progress = no_progress) -> Work:
    """Time `rounds` interleaved rounds, each a whole period of every method whose bytes are known."""
    shapes = by_name(shape)
    cpu = torch.device("cpu")
    given = [noise(shapes, GRADIENT_SCALE, seed, cpu) for seed in (1, 2)]
    turns: dict[str, Turn] = {}
    periods: dict[str, int] = {}
    for name in methods:
        method = family.METHODS[name]
        if method.bytes is None:
            continue
        params = [Parameter(weight) for weight in noise(shapes, WEIGHT_SCALE, 0, cpu)]
        optimizer = method.build(params, method.period, lr=LR)
        stepper = Stepper(params, optimizer, given)
        periods[name] = method.period
        # Every period begins with the same step, so that each one includes a whole tail.
        turns[name] = [partial(family.rewind, optimizer), nothing, *stepper.phases() * method.period]
        for phase in turns[name]:
            phase()
    flat = torch.zeros(2, numel(shapes))
    turns["copy_"] = [nothing, lambda: flat[0].copy_(flat[1])]
    samples = interleave(turns, HostClock(), rounds, progress=progress, repeats=1)
    seconds = {name: np.asarray(columns[:, 1::2].sum(axis=1)) for name, columns in samples.items()}
    copy = seconds.pop("copy_")
    return Work(shape, numel(shapes), {name: values / periods[name] for name, values in seconds.items()}, copy)
