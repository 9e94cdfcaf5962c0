"""MomentumSAM with displaced and clean weights: errors of wrong calls, and equal stochastic rounding afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_bits
from support.family import built, train
from torch import nn

import fused_sam
from fused_sam.schedule import Every


@pytest.mark.parametrize("call", ["eval", "train"])
def test_switching_within_unperturbed_is_an_error_and_changes_nothing(backend: str, call: str) -> None:
    model, optimizer = built("MomentumSAM", backend)
    twin, other = built("MomentumSAM", backend)
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    with optimizer.unperturbed():
        clean = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="inside `with optimizer"):
            getattr(optimizer, call)()
        assert_same_bits(model.parameters(), clean)
    train(model, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("method", ["LookSAM", "MomentumSAM"])
def test_loading_within_unperturbed_is_an_error(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2))
    if method == "LookSAM":
        optimizer.zero_grad()
        nets.loss_of(model, 3).backward()
        optimizer.first_step()
    stored = [p.detach().clone() for p in model.parameters()]
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match=r"load_state_dict\(\) inside `with optimizer"):
        optimizer.load_state_dict(saved)
    assert_same_bits(model.parameters(), stored)


def rounded(backend: str) -> tuple[nn.Module, Any]:
    model = nets.net(dtype=torch.bfloat16)
    return model, fused_sam.MomentumSAM(
        model.parameters(), rho=0.3, lr=0.1, momentum=0.9, stochastic_rounding=True, seed=4, backend=backend
    )


@pytest.mark.parametrize("looks", [1, 3])
def test_clean_weights_between_steps_change_no_bit_of_stochastic_rounding(backend: str, looks: int) -> None:
    model, optimizer = rounded(backend)
    twin, other = rounded(backend)
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    for _ in range(looks):
        optimizer.eval()
        optimizer.eval()  # the weights are clean already, so that no perturbation is undone
        optimizer.train()
    assert_same_bits(model.parameters(), twin.parameters())
    next(model.parameters()).grad = torch.ones(16, 6, dtype=torch.bfloat16).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):  # the error also undoes and repeats the perturbation
        optimizer.step()
    assert_same_bits(model.parameters(), twin.parameters())
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_bits(model.parameters(), twin.parameters())


def test_stochastic_rounding_resumes_from_a_checkpoint_within_unperturbed(backend: str) -> None:
    model, optimizer = rounded(backend)
    train(model, optimizer, range(3))
    with optimizer.unperturbed():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = rounded(backend)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.train()
    assert_same_bits(model.parameters(), other.parameters())
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same_bits(model.parameters(), other.parameters())


def test_no_weight_moves_if_no_perturbed_weight_has_momentum(backend: str) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = fused_sam.MomentumSAM(
        [{"params": [a], "perturb": False}, {"params": [b]}], lr=0.1, momentum=0.9, schedule=Every(1), backend=backend
    )
    a.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.displaced
    optimizer.state_dict()
    b.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.displaced
