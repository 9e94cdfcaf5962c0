"""Many steps: memory stays flat, counters are exact, an undo loses no bit, and weights stay those of plain torch."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch
from support.backends import NAMES
from support.bits import assert_same_bits
from support.campaign import Campaign
from support.draws import LAYOUTS, values
from torch import nn

import fused_sam
from fused_sam import SAM

BACKENDS = [name for name in NAMES if name != "triton"]  # whose interpreter takes milliseconds per kernel
SHORT, LONG = 2_000, 100_000
SHAPES = [(5, 3), (7,), (2, 2, 3, 1)]


def resident() -> int:
    """Return the bytes of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Watch:
    """Measures memory after a warm-up, and again at the end."""

    def __init__(self) -> None:
        gc.collect()
        self.objects, self.bytes = len(gc.get_objects()), resident()

    def assert_flat(self) -> None:
        gc.collect()
        # One leaked object per step would be thousands. The allocator grows by about 5 MB in the first 10,000 steps and
        # then stays, as 40,000 steps of the cpu backend showed.
        assert len(gc.get_objects()) - self.objects < 300
        assert resident() - self.bytes < 16 * 2**20


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(values(s, 1 + i, dtype)) for i, s in enumerate(SHAPES)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_do_not_drift_and_memory_stays_flat(campaign: Campaign, backend: str) -> None:
    """The loss is a bowl with noise, so that errors do not grow: any that remain are the optimizer's own.

    The plain side is SAM and SGD with momentum as formulas on one long vector.
    """
    steps = campaign.number(SHORT, LONG)
    campaign.count(cases=steps)
    params = start(torch.float64)
    w = torch.cat([p.detach().reshape(-1) for p in params])
    v = torch.zeros_like(w)
    noise = values((64, len(w)), 7)
    curvature = 1 + noise.abs()
    parts = [(c.split(sizes), n.split(sizes)) for sizes in [[p.numel() for p in params]]
             for c, n in zip(curvature, noise, strict=True)]  # fmt: skip
    optimizer = SAM(params, rho=0.05, lr=0.05, momentum=0.9, weight_decay=0.01, backend=backend)
    watch = None
    for step in range(steps):
        k = step % 64
        for half in (optimizer.first_step, optimizer.second_step):
            for p, c, n in zip(params, *parts[k], strict=True):
                p.grad = (p.detach().reshape(-1) * c + n).view_as(p)
            half()
        g = curvature[k] * w + noise[k]
        g_s = curvature[k] * (w + 0.05 * g / (g.norm() + 1e-12)) + noise[k]
        v = 0.9 * v + g_s + 0.01 * w
        w = w - 0.05 * v
        if step == steps // 5:
            watch = Watch()
    assert watch is not None
    watch.assert_flat()
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in params]), w, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_life_of_changes_keeps_memory_flat(campaign: Campaign, backend: str) -> None:
    """Gradients come and go, weights move, states are loaded, and options of a method with state of its own change."""
    if backend != "cpu" and not campaign.long:
        pytest.skip("what is kept between steps is the same for all backends: make campaign runs them all")
    steps = campaign.number(SHORT // 2, LONG // 20)
    campaign.count(cases=steps)
    draw = random.Random(5)
    params = start(torch.float32)
    # RNG streams, kept gradients, state vectors and group counters, all at once.
    optimizer: Any = fused_sam.LookSAM(
        params, torch.optim.AdamW, rho=0.05, k=3, lr=1e-3, backend=backend, schedule=fused_sam.schedule.Random(0.8)
    )
    watch = None
    for step in range(steps + 1):  # memory is measured where the weights have just moved, and the tables are new
        if step % 20 == 0:
            for p in params:
                p.data = p.data.clone()
        if step % 50 == 10:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for half in range(2):
            for i, p in enumerate(params):
                g = values(p.shape, step + i, torch.float32)
                p.grad = None if draw.random() < 0.2 else LAYOUTS["transposed"](g) if p.dim() == 2 else g
            if half == 0 and optimizer.needs_second_pass:
                optimizer.first_step()
                if step % 7 == 0:
                    with optimizer.unperturbed():
                        optimizer.state_dict()
                if step % 11 == 0:
                    optimizer.restore()
        optimizer.param_groups[0]["rho"] = 0.05 + 0.01 * (step % 3)
        optimizer.step()
        if step == steps // 2:
            watch = Watch()
    assert watch is not None
    watch.assert_flat()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_undo_loses_no_bit_however_often(campaign: Campaign, backend: str, dtype: torch.dtype) -> None:
    steps = campaign.number(SHORT // 5, LONG // 2)
    campaign.count(cases=steps)
    params = start(dtype)
    before = [p.detach().clone() for p in params]
    optimizer = SAM(params, rho=0.7, lr=0.1, adaptive=True, eta=0.1, backend=backend)
    grads = [[values(s, 10 * k + i, dtype) for i, s in enumerate(SHAPES)] for k in range(8)]
    for step in range(steps):
        for p, g in zip(params, grads[step % 8], strict=True):
            p.grad = g
        optimizer.first_step()
        if step < 8:
            assert not torch.equal(params[0], before[0])
        optimizer.restore()
    assert_same_bits(params, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counters_are_exact_after_many_steps(campaign: Campaign, backend: str) -> None:
    """Adam's step, the schedule's, and the number of random draws, which a checkpoint carries."""
    steps = campaign.number(SHORT // 4, LONG // 2)
    campaign.count(cases=steps)
    params = start(torch.bfloat16)
    optimizer = SAM(
        params, torch.optim.Adam, rho=0.05, lr=1e-6, stochastic_rounding=True, backend=backend,
        schedule=fused_sam.schedule.Every(4),
    )  # fmt: skip
    for p, s in zip(params, SHAPES, strict=True):
        p.grad = values(s, 3, torch.bfloat16)
    for _ in range(steps):
        if optimizer.needs_second_pass:
            optimizer.first_step()
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [steps] * 3
    group = optimizer.state_dict()["param_groups"][0]
    assert group["sam_step"] == steps
    assert group["rng_offset"] == (steps + -(-steps // 4)) % 2**24
