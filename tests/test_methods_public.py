"""The methods equal those of pytorch_optimizer in float64, if those follow the papers.

Its LookSAM on several tensors takes norms per tensor instead of global ones, and its centralised SAM takes the norm
before centralising. These two are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from support import nets
from torch import Tensor, nn

import fused_sam
from fused_sam.schedule import RhoProportionalToLR

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
STEPS = 8


def theirs(optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.first_step(zero_grad=True)
        loss(step).backward()
        optimizer.second_step(zero_grad=True)


def ours(optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            return value

        optimizer.step(closure)


def assert_close(a: nn.Module, b: nn.Module, within: float = 1e-8) -> None:  # pytorch_optimizer's norm is fp32
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=within)


def test_friendly_sam(backend: str) -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    ours(
        fused_sam.FriendlySAM(model.parameters(), rho=0.2, sigma=0.8, lmbda=0.7, backend=backend, **SGD),
        lambda step: nets.loss_of(model, step),
    )
    other = pytorch_optimizer.FriendlySAM(twin.parameters(), torch.optim.SGD, rho=0.2, sigma=0.8, lmbda=0.7, **SGD)
    theirs(other, lambda step: nets.loss_of(twin, step))
    assert_close(model, twin)


@pytest.mark.parametrize("decouple", [True, False])
def test_wsam(backend: str, decouple: bool) -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    options = {"rho": 0.2, "gamma": 0.8, "decouple": decouple, **SGD}
    ours(fused_sam.WSAM(model.parameters(), backend=backend, **options), lambda step: nets.loss_of(model, step))
    theirs(
        pytorch_optimizer.WSAM(twin, twin.parameters(), torch.optim.SGD, **options),
        lambda step: nets.loss_of(twin, step),
    )
    assert_close(model, twin)


def test_gsam_with_rho_tied_to_the_learning_rate(backend: str) -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    optimizer = fused_sam.GSAM(model.parameters(), alpha=0.5, backend=backend, **SGD)
    base = torch.optim.SGD(twin.parameters(), **SGD)
    rates = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 2 * STEPS, eta_min=0.01) for o in (optimizer, base)]
    rho = RhoProportionalToLR(optimizer, 0.3, 0.1, lr_max=0.1, lr_min=0.01)
    proportion = pytorch_optimizer.ProportionScheduler(rates[1], max_lr=0.1, min_lr=0.01, max_value=0.3, min_value=0.1)
    other = pytorch_optimizer.GSAM(twin.parameters(), base, twin, proportion, alpha=0.5, perturb_eps=1e-12)
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.step(nets.closure_for(model, step))
        rates[0].step()
        rho.step()
        other.set_closure(nn.functional.cross_entropy, *nets.batch(step, torch.float64))
        other.step()
        rates[1].step()
        other.update_rho_t()
    assert optimizer.param_groups[0]["rho"] < 0.25
    assert_close(model, twin)


def test_looksam_of_one_tensor(backend: str) -> None:
    models = [nn.Linear(6, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def loss_of(model: nn.Module) -> Callable[[int], Tensor]:
        def loss(step: int) -> Tensor:
            x, y = nets.batch(step, torch.float64)
            return nn.functional.cross_entropy(model(x), y)

        return loss

    options = {"rho": 0.2, "k": 3, "alpha": 0.4, **SGD}
    ours(fused_sam.LookSAM(models[0].parameters(), backend=backend, **options), loss_of(models[0]))
    theirs(pytorch_optimizer.LookSAM(models[1].parameters(), torch.optim.SGD, **options), loss_of(models[1]))
    assert_close(*models, within=1e-6)  # it adds 1e-8 to ||g_v||, which is 0.01 to 0.1; over eight steps
