"""The numbers that a step is designed to reach on a CPU, and the verdicts on a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.optim import SGD

from bench.host_cost import HostCost
from bench.memory import Usage
from bench.peers import PEERS
from bench.side_by_side import Comparison

# The peer's time over ours, as a ratio of medians in one run.
SPEED = {
    "SGD": {
        ("transformer24m", "per-tensor"): 3.5,
        ("transformer24m", "foreach-fused"): 2.0,
        ("resnet50", "per-tensor"): 3.0,
        ("resnet50", "foreach-fused"): 2.0,
        ("1000x256", "per-tensor"): 30.0,
        ("1000x256", "foreach-fused"): 10.0,
    },
    "AdamW": {("transformer24m", "foreach-fused"): 1.4, ("resnet50", "foreach-fused"): 1.4},
}
COPY_FRACTION = 1.0  # the least rate of moving bytes over that of torch's copy_
COPY_SHAPE = "transformer24m"
HOST_SECONDS, HOST_TENSORS = 100e-6, 161
LINEAR = 2.0  # cost per tensor at 10,000 tensors over that at 1,000, which is 1 if the growth is linear


@dataclass(frozen=True)
class Outcome:
    """One target and what the run reached, as text."""

    what: str
    target: str
    reached: str
    met: bool


def outcomes(comparisons: Iterable[Comparison], usages: Iterable[Usage], cost: HostCost | None) -> list[Outcome]:
    """Return the outcomes of all targets that were measured."""
    return [*speed(comparisons), *memory(usages), *(host(cost) if cost else [])]


def speed(comparisons: Iterable[Comparison]) -> list[Outcome]:
    found = []
    for run in comparisons:
        if not PEERS[run.baseline].ours:
            continue
        for (shape, peer), target in SPEED[run.base.__name__].items():
            if (shape, run.dtype) == (run.shape, torch.float32) and peer in run.steps:
                ratio = run.ratio(peer)
                what = f"{shape}: times faster than {peer}"
                reached = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
                found.append(Outcome(what, f">= {target:g}", reached, ratio.value >= target))
        if (run.shape, run.dtype, run.base) == (COPY_SHAPE, torch.float32, SGD):
            share = run.copy_fraction()
            reached = f"{share.value:.2f} ({run.rate() / 1e9:.1f} over {run.copy_rate() / 1e9:.1f} GB/s)"
            what = f"{run.shape}: bytes moved, of copy_'s rate"
            found.append(Outcome(what, f">= {COPY_FRACTION:g}", reached, share.value >= COPY_FRACTION))
    return found


def memory(usages: Iterable[Usage]) -> list[Outcome]:
    found = []
    for usage in usages:
        if not PEERS[usage.peer].ours:
            continue
        copies = usage.kept / usage.weights
        what = f"{usage.shape}: memory kept, in copies of the weights"
        found.append(Outcome(what, "<= 1", f"{copies:.4f}", copies <= 1.001))
        what = f"{usage.shape}: largest allocation in a step"
        target = f"< {usage.smallest_tensor:,} B, the smallest tensor"
        found.append(Outcome(what, target, f"{usage.largest:,} B", usage.largest < usage.smallest_tensor))
    return found


def host(cost: HostCost) -> list[Outcome]:
    found = []
    limit = f"< {HOST_SECONDS * 1e6:.0f} us"
    shape = f"{HOST_TENSORS}x1"
    if shape in cost.beside_kernels:
        seconds = cost.beside_kernels[shape].median
        what = f"host cost of a step at {HOST_TENSORS} tensors, beyond the kernels"
        found.append(Outcome(what, limit, f"{seconds * 1e6:.0f} us", seconds < HOST_SECONDS))
    if {1000, 10000} <= set(cost.counts):
        growth = cost.at(10000) / cost.at(1000) / 10
        what = "host cost per tensor, 10,000 tensors over 1,000"
        found.append(Outcome(what, f"< {LINEAR:g}", f"{growth:.2f}", growth < LINEAR))
    return found
