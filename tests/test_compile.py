"""A compiled model with an eager optimizer is not compiled again when weights, learning rates or rho change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.nets import batch, loss_of, net, two_steps
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_sam import SAM


@pytest.fixture
def compilations() -> Iterator[list[int]]:
    """Return a list that gets one entry per compiled graph."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(model: nn.Module, graphs: list[int]) -> Any:
    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return module.forward

    return torch.compile(model, backend=backend)


CASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"base_optimizer": torch.optim.AdamW, "lr": 0.01},
    "wrapped": {"base_optimizer": torch.optim.RMSprop, "lr": 0.01},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_nothing_is_compiled_again(backend: str, options: dict[str, Any], compilations: list[int]) -> None:
    model, twin = net(), net()
    fast = compiled(model, compilations)
    optimizer = SAM(model.parameters(), rho=0.1, backend=backend, **options)
    other = SAM(twin.parameters(), rho=0.1, backend=backend, **options)
    schedules = [CosineAnnealingLR(o, 20) for o in (optimizer, other)]
    for step in range(20):
        optimizer.param_groups[0]["rho"] = other.param_groups[0]["rho"] = 0.1 + 0.01 * step
        x, y = batch(step)
        for half in (optimizer.first_step, optimizer.second_step):
            nn.functional.cross_entropy(fast(x), y).backward()
            half(zero_grad=True)
        two_steps(twin, other, step)
        for schedule in schedules:
            schedule.step()
        if step == 1:
            first = len(compilations)
    assert len(compilations) == first
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # a graph rounds in other places than single operations


def test_a_skipped_step_compiles_nothing(compilations: list[int]) -> None:
    model = net()
    fast = compiled(model, compilations)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    for step in range(6):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(fast(x), y) * (float("inf") if step % 2 else 1.0)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(fast(x), y).backward()
        optimizer.second_step(zero_grad=True)
        assert optimizer.step_was_skipped == bool(step % 2)
    assert len(compilations) <= 2
    assert loss_of(model, 0).isfinite()
