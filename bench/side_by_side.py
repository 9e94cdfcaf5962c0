"""Times of peers in one process in interleaved rounds, with torch's `copy_` of the same size among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from bench import agreement, traffic
from bench.clock import clock_for
from bench.errors import BenchError
from bench.hyper import Hyper
from bench.peers import PEERS, Peer, baseline
from bench.rounds import Progress, Turn, interleave, no_progress
from bench.shapes import by_name, numel, title
from bench.stats import Ratio, Samples, Summary, ratio_of_medians, summary
from bench.work import GRADIENT_SCALE, WEIGHT_SCALE, noise, parameters


@dataclass(frozen=True)
class Comparison:
    """Seconds on one list of shapes: `steps[peer]` is [rounds, 2], first and second step; `copy` [rounds]."""

    shape: str
    tensors: int
    numel: int
    baseline: str
    steps: dict[str, Samples]
    copy: Samples
    dtype: torch.dtype
    base: type[Optimizer]

    @property
    def moved(self) -> int:
        """Bytes that the baseline's step must move."""
        return traffic.step_bytes(self.numel, self.dtype.itemsize, self.base)

    @property
    def copied(self) -> int:
        """Bytes that the `copy_` moves."""
        return traffic.copy_bytes(self.numel, self.dtype.itemsize)

    @property
    def title(self) -> str:
        return title(self.shape) + (", bf16" if self.dtype is torch.bfloat16 else "")

    def label(self, peer: str) -> str:
        return PEERS[peer].label(self.base)

    def total(self, peer: str) -> Samples:
        return self.steps[peer].sum(axis=1)

    def ratio(self, peer: str) -> Ratio:
        """Return the peer's step over the baseline's."""
        return ratio_of_medians(self.total(peer), self.total(self.baseline))

    def phases(self, peer: str) -> tuple[Summary, Summary]:
        return summary(self.steps[peer][:, 0]), summary(self.steps[peer][:, 1])

    def copy_rate(self) -> float:
        """Return the bytes per second of torch's `copy_`, read and written."""
        return self.copied / float(np.median(self.copy))

    def rate(self) -> float:
        """Return the bytes per second of the baseline's step, counted at the fused floor."""
        return self.moved / float(np.median(self.total(self.baseline)))

    def copy_fraction(self) -> Ratio:
        """Return the baseline's rate over that of `copy_`."""
        work = self.moved / self.copied
        ratio = ratio_of_medians(self.copy, self.total(self.baseline))
        return Ratio(work * ratio.value, work * ratio.low, work * ratio.high)

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds: times in seconds, rates in bytes per second."""
        peers = {}
        for name in self.steps:
            first, second = self.phases(name)
            peers[name] = {
                "label": self.label(name),
                "step": asdict(summary(self.total(name))),
                "first_step": asdict(first),
                "second_step": asdict(second),
                "ratio": asdict(self.ratio(name)),
            }
        return {
            "shape": self.shape, "base": self.base.__name__, "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": self.tensors, "numel": self.numel, "baseline": self.baseline,
            "peers": peers, "copy": asdict(summary(self.copy)), "copy_rate": self.copy_rate(),
            "step_bytes": self.moved, "rate": self.rate(),
            "copy_fraction": asdict(self.copy_fraction()),
        }  # fmt: skip


def compare(
    shape: str,
    names: list[str],
    device: torch.device,
    hyper: Hyper,
    rounds: int | None = None,
    seconds: float = 20.0,
    progress: Progress = no_progress,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Check that the peers agree, then time them in `rounds` rounds, or in as many as fit into `seconds`.

    Every peer has its own weights, gradients and state, so that none finds its data in the cache because of another.
    """
    shapes = by_name(shape)
    peers = build(names, shape, device, hyper, dtype)
    agreement.check(peers, shapes)
    flat = torch.zeros(2, numel(shapes), device=device, dtype=dtype)  # written now, against page faults later
    turns: dict[str, Turn] = {name: [peer.first_step, peer.second_step] for name, (peer, _) in peers.items()}
    turns["copy_"] = [lambda: flat[0].copy_(flat[1])]
    samples = interleave(turns, clock_for(device), rounds, seconds, progress)
    copy = samples.pop("copy_")[:, 0]
    return Comparison(shape, len(shapes), numel(shapes), baseline(names), samples, copy, dtype, hyper.base)


def build(
    names: list[str], shape: str, device: torch.device, hyper: Hyper, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Peer, list[torch.nn.Parameter]]]:
    """Return every peer on parameters of its own, all with the same values."""
    shapes = by_name(shape)
    weights, grads = (noise(shapes, scale, seed, device) for scale, seed in ((WEIGHT_SCALE, 0), (GRADIENT_SCALE, 1)))
    built = {}
    for name in names:
        params = parameters([w.to(dtype) for w in weights], [g.to(dtype) for g in grads])
        try:
            built[name] = PEERS[name].build(params, hyper), params
        except (ImportError, RuntimeError, ValueError) as error:
            raise BenchError(f"peer {name} cannot run on {device}: {error}") from error
    return built
