"""The cost of SAM's step on 1, 2 and 4 processes, against the same step alone and against bare all-reduces.

Every process holds the same number of elements, however many processes there are. Under DDP that is a whole copy, under
FSDP2 a part of a network that grows with the processes. `plain` is the same optimizer on ordinary weights. It runs in
the same processes at the same time, so that all share cores and memory alike. A time is that of the slowest process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn import Parameter

from bench import spread
from bench.clock import HostClock
from bench.hyper import Hyper
from bench.processes import together
from bench.rounds import Progress, Turn, interleave, no_progress
from bench.shapes import Shape, by_name, numel
from bench.stats import Ratio, Samples, Summary, ratio_of_medians, summary
from fused_sam import SAM

WORLDS = (1, 2, 4)
REDUCED = 4  # numbers in the one all-reduce per phase that SAM makes
PHASES = 2


@dataclass(frozen=True)
class Spread:
    """Seconds [rounds] of both phases on `world` processes, for `spread.WAYS` and for two bare all-reduces."""

    world: int
    shape: str
    local: int  # elements on each process
    steps: dict[str, Samples]
    reduces: Samples

    def step(self, way: str) -> Summary:
        return summary(self.steps[way])

    def over_plain(self, way: str) -> Ratio:
        return ratio_of_medians(self.steps[way], self.steps["plain"])

    def over_prediction(self) -> Ratio:
        """Return the ratio of FSDP2's step to the plain one plus one all-reduce per phase."""
        return ratio_of_medians(self.steps["FSDP2"], self.steps["plain"] + self.reduces)

    def added(self) -> Summary:
        """Return the seconds that FSDP2's step takes beyond the plain one, round by round."""
        return summary(self.steps["FSDP2"] - self.steps["plain"])

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds; times are in seconds."""
        return {
            "world": self.world, "shape": self.shape, "local": self.local,
            "steps": {way: asdict(self.step(way)) for way in self.steps},
            "over_plain": {way: asdict(self.over_plain(way)) for way in self.steps},
            "all_reduces": asdict(summary(self.reduces)), "fsdp2_added": asdict(self.added()),
            "fsdp2_over_plain_and_all_reduces": asdict(self.over_prediction()),
        }  # fmt: skip


def measure(shape: str, world: int, hyper: Hyper, rounds: int, repeats: int) -> Spread:
    """Time `rounds` interleaved rounds on `world` processes; every turn repeats its phases `repeats` times."""
    by_process = together(world, timed, shape, hyper, rounds, repeats)
    slowest = {name: np.max([samples[name] for samples in by_process], axis=0) for name in by_process[0]}
    reduces = slowest.pop("all-reduce")
    return Spread(world, shape, numel(by_name(shape)), slowest, reduces)


def measure_all(
    shape: str,
    hyper: Hyper,
    rounds: int,
    repeats: int,
    worlds: tuple[int, ...] = WORLDS,
    progress: Progress = no_progress,
) -> list[Spread]:
    found = []
    for done, world in enumerate(worlds):
        found.append(measure(shape, world, hyper, rounds, repeats))
        progress((done + 1) / len(worlds))
    return found


def timed(rank: int, world: int, shape: str, hyper: Hyper, rounds: int, repeats: int) -> dict[str, Samples]:
    """Return one process's seconds of both phases [rounds], by turn."""
    numbers = torch.zeros(REDUCED, dtype=torch.float64)

    def reduce() -> None:
        distributed.all_reduce(numbers)

    turns: dict[str, Turn] = {"all-reduce": [distributed.barrier, *[reduce] * PHASES]}
    models = {}
    for way in spread.WAYS:
        shapes = by_name(shape)
        models[way] = spread.trained(grown(shapes, world) if way == "FSDP2" else shapes, way)
        turns[way] = [distributed.barrier, *phases(list(models[way].parameters()), hyper)]
        for phase in turns[way]:  # the first step makes the state and compares the processes' parameters
            phase()
    samples = interleave(turns, HostClock(), rounds, repeats=repeats)
    distributed.barrier()
    return {name: columns[:, 1:].sum(axis=1) for name, columns in samples.items()}


def grown(shapes: list[Shape], world: int) -> list[Shape]:
    """Return shapes whose `world` parts along the first dimension have the given shapes."""
    return [(first * world, *rest) for first, *rest in shapes]


def phases(params: list[Parameter], hyper: Hyper) -> Turn:
    sam = SAM(params, hyper.base, rho=hyper.rho, **hyper.options())
    return [sam.first_step, sam.second_step]
