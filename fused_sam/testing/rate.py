"""The rate of a whole step: bytes that it has to move, per second."""

from __future__ import annotations

import os
import statistics
import time

import torch
from torch import nn

from fused_sam.sam import SAM

BYTES = 44  # per parameter: norm 4, perturb 16, norm 4, update of SGD with momentum and undo 20
ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # beyond the caches
TENSORS = 16
ENOUGH = 2.0  # seconds, after which a slow backend is timed no further


def step_rate(backend: str, device: torch.device, rounds: int = 5) -> float | None:
    """Return the GB/s of fp32 steps of SAM with SGD and momentum, the median of some; None for an interpreter."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    elements = ELEMENTS.get(device.type, ELEMENTS["cpu"])
    params = [nn.Parameter(torch.ones(elements // TENSORS, device=device)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = SAM(params, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, backend=backend)
    seconds = []
    begin = time.perf_counter()
    for _ in range(rounds + 2):
        _wait(device)
        start = time.perf_counter()
        optimizer.first_step()
        optimizer.second_step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 2 and time.perf_counter() - begin > ENOUGH:
            break
    return BYTES * elements / statistics.median(seconds[2:]) / 1e9  # the first steps make tables and state


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device) if hasattr(torch, "accelerator") else torch.cuda.synchronize(device)
