"""`python -m bench.groups`: what a step over 50 parameter groups costs, relative to one over a single group."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from fused_sam import SAM

TENSORS, SIZE, GROUPS, ROUNDS = 100, 20_000, 50, 200
LIMIT = 1.1  # of the time of one group


def make(groups: int, norm: str) -> tuple[SAM, list[nn.Parameter]]:
    """Return an optimizer over as many groups, each with a rho of its own, and its parameters with gradients."""
    params = [nn.Parameter(torch.randn(SIZE)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    split = [{"params": params[k::groups], "rho": 0.01 * (1 + k)} for k in range(groups)]
    return SAM(split, torch.optim.SGD, norm=norm, lr=1e-6, momentum=0.9), params


def step_time(optimizer: SAM) -> float:
    """Return the seconds of both halves of a step, without backward passes."""
    start = time.perf_counter()
    optimizer.first_step()
    optimizer.second_step()
    return time.perf_counter() - start


def main() -> None:
    for norm in ("global", "tensor"):
        one, many = make(1, norm)[0], make(GROUPS, norm)[0]
        ratios = []
        for k in range(ROUNDS):  # by turns, so that a change of the machine's speed counts for both
            times = step_time(one), step_time(many)
            if k >= ROUNDS // 10:
                ratios.append(times[1] / times[0])
        ratio = statistics.median(ratios)
        print(f'norm="{norm}": {GROUPS} groups take {ratio:.3f} of the time of one (at most {LIMIT})')


if __name__ == "__main__":
    main()
