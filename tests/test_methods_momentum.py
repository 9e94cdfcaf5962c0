"""Tests of MomentumSAM: displaced and clean weights, groups without momentum, and Adam's first moment."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import nets
from support.bits import Snapshot, assert_same_bits
from support.family import built, train
from torch import Tensor, nn

import fused_sam
from fused_sam.training import sam_step


def test_momentum_sam_raises_an_error_if_its_weights_are_displaced(backend: str) -> None:
    model, optimizer = built("MomentumSAM", backend)
    handle = optimizer.guard(model)
    assert not optimizer.displaced and not optimizer.needs_second_pass
    model.eval()
    model(nets.batch(0)[0])
    model.train()
    train(model, optimizer, range(2))
    assert optimizer.displaced and not optimizer.perturbed
    stored = [p.detach().clone() for p in model.parameters()]
    for attempt in (optimizer.state_dict, lambda: copy.deepcopy(optimizer), lambda: pickle.dumps(optimizer)):
        with pytest.raises(RuntimeError, match=r"call optimizer.eval\(\) first"):
            attempt()
    model.eval()
    with pytest.raises(RuntimeError, match="weights are displaced"):
        model(nets.batch(0)[0])
    with optimizer.unperturbed():
        model(nets.batch(0)[0])
        inside = [p.detach().clone() for p in model.parameters()]
    assert_same_bits(model.parameters(), stored)
    optimizer.eval()
    optimizer.eval()
    assert_same_bits(model.parameters(), inside)
    optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    assert_same_bits(model.parameters(), stored)
    handle.remove()
    model(nets.batch(0)[0])
    for call in (optimizer.first_step, optimizer.second_step):
        with pytest.raises(RuntimeError, match="one pass"):
            call()
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(stored[:4], inside[:4], strict=True)) ** 0.5
    assert 0.1 < distance < 0.2 + 1e-6  # the distance lies between the two groups' rho
    assert_same_bits(stored[4:], inside[4:])  # the group with perturb=False


def test_momentum_sam_raises_an_error_for_a_step_between_load_and_train(backend: str) -> None:
    model, optimizer = built("MomentumSAM", backend)
    train(model, optimizer, range(2))
    optimizer.eval()
    other, loaded = built("MomentumSAM", backend)
    loaded.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    before = Snapshot(loaded)
    nets.loss_of(other, 2).backward()
    with pytest.raises(RuntimeError, match=r"after load_state_dict\(\)"):
        loaded.step()
    before.assert_unchanged()


def test_momentum_sam_with_sam_step_and_an_exception(backend: str) -> None:
    model, optimizer = built("MomentumSAM", backend)

    def mean(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(data[0]), data[1])

    for step in range(3):
        result = sam_step(model, mean, nets.batch(step), optimizer)
        assert result.perturbed_loss is None
    before = Snapshot(optimizer)
    next(model.parameters()).grad = torch.ones(16, 6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    before.assert_unchanged()
    optimizer.zero_grad()
    sam_step(model, mean, nets.batch(4), optimizer)


def test_momentum_sam_checks_the_momentum_of_added_groups(backend: str) -> None:
    _, optimizer = built("MomentumSAM", backend)
    with pytest.raises(ValueError, match="group 3 has no momentum"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": 0.0})
    assert len(optimizer.param_groups) == 3


def test_momentum_sam_with_adam_displaces_along_its_first_moment(backend: str) -> None:
    model, twin = nets.net(), nets.net(dtype=torch.float64)
    optimizer = fused_sam.MomentumSAM(
        model.parameters(), torch.optim.AdamW, rho=0.3, lr=0.01, betas=(0.8, 0.9), backend=backend
    )
    base = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.8, 0.9), foreach=False)
    for step in range(5):
        optimizer.zero_grad()
        nets.loss_of(model, step).backward()
        optimizer.step()
        clean = [p.detach().clone() for p in twin.parameters()]
        with torch.no_grad():
            if step:
                m = [base.state[p]["exp_avg"] for p in twin.parameters()]
                norm = sum(float(x.square().sum()) for x in m) ** 0.5
                for p, x in zip(twin.parameters(), m, strict=True):
                    p -= 0.3 * x / norm
        base.zero_grad()
        nets.loss_of(twin, step).backward()
        with torch.no_grad():
            for p, w in zip(twin.parameters(), clean, strict=True):
                p.copy_(w)
        base.step()
    optimizer.eval()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=2e-5)  # fp32 over five steps of Adam
