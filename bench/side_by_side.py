"""Times peers in one process in interleaved rounds, with torch's `copy_` of the same size among them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bench import agreement, traffic
from bench.clock import Clock, clock_for, quiet
from bench.errors import BenchError
from bench.hyper import Hyper
from bench.peers import PEERS, Peer, baseline
from bench.shapes import by_name, numel
from bench.stats import Ratio, Samples, Summary, ratio_of_medians, summary
from bench.work import GRADIENT_SCALE, WEIGHT_SCALE, noise, parameters

MIN_ROUNDS, MAX_ROUNDS = 15, 200
PATIENCE, FEWEST_ROUNDS = 4, 5  # past so many times its seconds, as on a busy machine, a shape ends with fewer
TURN_SECONDS = 2e-3  # a turn of short steps repeats them this long, so that caches and branch predictors settle


@dataclass(frozen=True)
class Comparison:
    """Seconds on one list of shapes: `steps[peer]` is [rounds, 2], first and second step; `copy` [rounds]."""

    shape: str
    tensors: int
    numel: int
    baseline: str
    steps: dict[str, Samples]
    copy: Samples

    def total(self, peer: str) -> Samples:
        return self.steps[peer].sum(axis=1)

    def ratio(self, peer: str) -> Ratio:
        """How many times the baseline's step fits into the peer's."""
        return ratio_of_medians(self.total(peer), self.total(self.baseline))

    def phases(self, peer: str) -> tuple[Summary, Summary]:
        return summary(self.steps[peer][:, 0]), summary(self.steps[peer][:, 1])

    def copy_rate(self) -> float:
        """Bytes a second of torch's `copy_`, read and written."""
        return traffic.copy_bytes(self.numel) / float(np.median(self.copy))

    def rate(self) -> float:
        """Bytes a second of the baseline's step, counted at the fused floor."""
        return traffic.step_bytes(self.numel) / float(np.median(self.total(self.baseline)))

    def copy_fraction(self) -> Ratio:
        """The baseline's rate over that of `copy_`."""
        work = traffic.step_bytes(self.numel) / traffic.copy_bytes(self.numel)
        ratio = ratio_of_medians(self.copy, self.total(self.baseline))
        return Ratio(work * ratio.value, work * ratio.low, work * ratio.high)

    def as_json(self) -> dict[str, Any]:
        """Times in seconds, rates in bytes a second."""
        peers = {}
        for name in self.steps:
            first, second = self.phases(name)
            peers[name] = {
                "label": PEERS[name].label,
                "step": asdict(summary(self.total(name))),
                "first_step": asdict(first),
                "second_step": asdict(second),
                "ratio": asdict(self.ratio(name)),
            }
        return {
            "shape": self.shape, "tensors": self.tensors, "numel": self.numel, "baseline": self.baseline,
            "peers": peers, "copy": asdict(summary(self.copy)), "copy_rate": self.copy_rate(),
            "step_bytes": traffic.step_bytes(self.numel), "rate": self.rate(),
            "copy_fraction": asdict(self.copy_fraction()),
        }  # fmt: skip


def compare(
    shape: str,
    names: list[str],
    device: torch.device,
    hyper: Hyper,
    rounds: int | None = None,
    seconds: float = 20.0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Comparison:
    """Check that the peers agree, then time them: `rounds` rounds, or as many as fit into `seconds`.

    Every peer owns its weights, gradients and state, so none finds its data in the cache because of another.
    """
    shapes = by_name(shape)
    peers = build(names, shape, device, hyper)
    agreement.check(peers, shapes)
    flat = torch.zeros(2, numel(shapes), device=device)  # written now: no page faults later
    turns: dict[str, list[Callable[[], object]]] = {
        name: [peer.first_step, peer.second_step] for name, (peer, _) in peers.items()
    }
    turns["copy_"] = [lambda: flat[0].copy_(flat[1])]
    clock = clock_for(device)
    with quiet():
        repeats = {name: warm_up(turn, clock) for name, turn in turns.items()}
        started = time.perf_counter()
        samples: dict[str, list[Samples]] = {name: [] for name in turns}
        done = 0
        while not finished(done, rounds, time.perf_counter() - started, seconds):
            order = random.Random(done).sample(list(turns), len(turns))
            for name in order:
                samples[name].append(take_turn(turns[name], repeats[name], clock))
            done += 1
            progress(done / rounds if rounds else max((time.perf_counter() - started) / seconds, done / MAX_ROUNDS))
    stacked = {name: np.stack(values) for name, values in samples.items()}
    copy = stacked.pop("copy_")[:, 0]
    return Comparison(shape, len(shapes), numel(shapes), baseline(names), stacked, copy)


def build(
    names: list[str], shape: str, device: torch.device, hyper: Hyper
) -> dict[str, tuple[Peer, list[torch.nn.Parameter]]]:
    """Every peer on parameters of its own, all with the same values."""
    shapes = by_name(shape)
    weights, grads = noise(shapes, WEIGHT_SCALE, 0, device), noise(shapes, GRADIENT_SCALE, 1, device)
    built = {}
    for name in names:
        params = parameters(weights, grads)
        try:
            built[name] = PEERS[name].build(params, hyper), params
        except (ImportError, RuntimeError, ValueError) as error:
            raise BenchError(f"peer {name} cannot run on {device}: {error}") from error
    return built


def warm_up(turn: list[Callable[[], object]], clock: Clock) -> int:
    """Run a few steps; return how often a turn repeats the step."""
    took = min(float(take_turn(turn, 1, clock).sum()) for _ in range(3))
    return max(1, min(100, math.ceil(TURN_SECONDS / max(took, 1e-9))))


def take_turn(turn: list[Callable[[], object]], repeats: int, clock: Clock) -> Samples:
    """[phases] seconds: of each phase the median over the repeats."""
    clock.mark()
    for _ in range(repeats):
        for phase in turn:
            phase()
            clock.mark()
    return np.median(np.array(clock.seconds()).reshape(repeats, len(turn)), axis=0)


def finished(done: int, rounds: int | None, spent: float, seconds: float) -> bool:
    if rounds is not None:
        return done >= rounds
    enough = MIN_ROUNDS if spent < PATIENCE * seconds else FEWEST_ROUNDS
    return done >= MAX_ROUNDS or (done >= enough and spent >= seconds)
