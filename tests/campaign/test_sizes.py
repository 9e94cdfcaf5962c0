"""Extremes of size: ten thousand tensors, and one tensor of more elements than 32 bits can count."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.backends import NAMES
from support.campaign import Campaign
from support.draws import values
from torch import Tensor, nn

from fused_sam import SAM

BACKENDS = [name for name in NAMES if name != "triton"]  # whose interpreter is too slow

COUNT = 10_000
RHO, LR, MOMENTUM = 0.3, 0.1, 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_tensors(campaign: Campaign, backend: str) -> None:
    """The steps are those of one long vector in plain torch. Every seventh tensor has no gradient."""
    campaign.count(cases=1)
    draw = random.Random(3)
    sizes = [draw.randint(0, 9) for _ in range(COUNT)]
    total = sum(sizes)
    w, v = values((total,), 1), torch.zeros(total, dtype=torch.float64)
    params = [nn.Parameter(part.clone()) for part in w.split(sizes)]
    absent = torch.cat([torch.full((size,), i % 7 == 3) for i, size in enumerate(sizes)])
    half_rate = torch.arange(COUNT).repeat_interleave(torch.tensor(sizes)) >= COUNT // 2
    rates = torch.where(half_rate, LR / 2, torch.tensor(LR, dtype=torch.float64))
    groups = [{"params": params[: COUNT // 2]}, {"params": params[COUNT // 2 :], "lr": LR / 2}]
    optimizer = SAM(groups, rho=RHO, lr=LR, momentum=MOMENTUM, backend=backend)
    for step in range(campaign.number(1, 2)):
        clean = w
        for half in range(2):
            g = values((total,), 10 + 2 * step + half)
            for i, (p, part) in enumerate(zip(params, g.split(sizes), strict=True)):
                p.grad = None if i % 7 == 3 else part.clone()
            g[absent] = 0.0
            if half == 0:
                optimizer.first_step()
                w = clean + RHO * g / (g.norm() + 1e-12)
            else:
                optimizer.second_step()
                v = torch.where(absent, v, MOMENTUM * v + g)
                w = torch.where(absent, clean, clean - rates * v)
            # Sums of 45,000 squares in two orders differ by 1e-14 of their value.
            torch.testing.assert_close(torch.cat([p.detach() for p in params]), w, rtol=0, atol=1e-12)


# ---- more than 2**31 elements -----------------------------------------------------------------------------------

# Weights are multiples of 1/64 and gradients of 1/32, which bf16 represents, in periods that no power of two divides.
# A kernel with a wrong index reads the value of another place.
PERIODS = (251, 241)
TILE = PERIODS[0] * PERIODS[1] * 40
ELEMENTS = 2**31 + 12_345
NEEDED = 3 * 2 * ELEMENTS + 3 * 2**30  # weight, gradient and backup, and what else a process takes


def available() -> int:
    """Return how many bytes of memory the machine can give."""
    listing = Path("/proc/meminfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    for limit in limits:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free.append(int(text))
    return min(free, default=0)


def pattern(period: int, unit: float) -> Tensor:
    return (((torch.arange(TILE) % period) - period // 2) * unit).bfloat16()


def fill(t: Tensor, tile: Tensor) -> None:
    whole = len(t) // TILE * TILE
    t[:whole].view(-1, TILE)[:] = tile
    t[whole:] = tile[: len(t) - whole]


def assert_all(t: Tensor, tile: Tensor, error: Tensor | None = None) -> None:
    """Check every element against the tile: bit for bit, or within an error."""
    for begin in range(0, len(t), TILE):
        part = t[begin : begin + TILE]
        if error is None:
            assert torch.equal(part, tile[: len(part)]), begin
        else:
            off = (part.float() - tile[: len(part)]).abs()
            assert bool((off <= error[: len(part)]).all()), (begin, float(off.max()))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled CPU module is not there")
def test_a_tensor_of_more_than_two_to_the_31_elements(campaign: Campaign) -> None:
    if not campaign.long:
        pytest.skip("it takes 13 GB and a minute: make campaign runs it")
    if available() < NEEDED:
        pytest.skip(f"it takes {NEEDED / 1e9:.0f} GB of memory, and {available() / 1e9:.0f} GB are free")
    campaign.count(cases=1)
    tile_w, tile_g = pattern(PERIODS[0], 1 / 64), pattern(PERIODS[1], 1 / 32)
    p = nn.Parameter(torch.empty(ELEMENTS, dtype=torch.bfloat16))
    p.grad = torch.empty_like(p)
    with torch.no_grad():
        fill(p.data, tile_w)
    fill(p.grad, tile_g)
    whole, rest = divmod(ELEMENTS, TILE)
    squares = tile_g.double().square()
    norm = float((whole * squares.sum() + squares[:rest].sum()).sqrt())
    optimizer = SAM([p], rho=norm / 16, lr=0.25, backend="cpu")
    optimizer.first_step()
    assert abs(float(optimizer.grad_norm) / norm - 1) < 1e-9
    perturbed = tile_w.float() + tile_g.float() / 16
    # Half a unit in the last place of bf16 is 2**-8 of the value at most. fp32 adds 1e-6.
    assert_all(p.data, perturbed, perturbed.abs() * 2**-8 + 1e-6)
    optimizer.restore()
    assert_all(p.data, tile_w)
    optimizer.first_step()
    optimizer.second_step()
    updated = tile_w.float() - tile_g.float() / 4
    assert_all(p.data, updated, updated.abs() * 2**-8 + 1e-6)
