"""Tests of Lion: the plain class equals its formula, and the fused one equals a float64 loop on every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from support.draws import ODD_SHAPES, values, weights
from torch import Tensor, nn

from fused_sam import SAM, Lion, MomentumSAM

OPTIONS: dict[str, Any] = {"lr": 0.003, "betas": (0.85, 0.93), "weight_decay": 0.2}


class Formula:
    """Algorithm 2 of arXiv 2302.06675 in float64, one tensor at a time."""

    def __init__(self, w: Tensor, *, maximize: bool = False) -> None:
        self.w, self.m = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
        self.sign = -1.0 if maximize else 1.0

    def step(self, g: Tensor) -> Tensor:
        """Take a step. Return the argument of sign(); rounding may change the sign of elements near 0."""
        (beta1, beta2), g = OPTIONS["betas"], self.sign * g.double()
        c = beta1 * self.m + (1 - beta1) * g
        self.w = self.w - OPTIONS["lr"] * (c.sign() + OPTIONS["weight_decay"] * self.w)
        self.m = beta2 * self.m + (1 - beta2) * g
        return c


@pytest.mark.parametrize("maximize", [False, True])
def test_the_plain_class_equals_the_formula(maximize: bool) -> None:
    p = nn.Parameter(values((5, 7), 1))
    twin = Formula(p.detach(), maximize=maximize)
    optimizer = Lion([p], maximize=maximize, **OPTIONS)
    for step in range(6):
        p.grad = values((5, 7), 10 + step)
        twin.step(p.grad)
        optimizer.step()
    torch.testing.assert_close(p.detach(), twin.w, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], twin.m, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_lion_under_sam_equals_the_formula(backend: str, dtype: torch.dtype) -> None:
    """The test has several groups and odd sizes. g_s is any gradient of the second backward pass."""
    params = weights(ODD_SHAPES, dtype)
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "maximize": True}]
    masters = {"master_weights": True} if dtype is torch.bfloat16 else {}
    optimizer = SAM(groups, Lion, rho=0.1, backend=backend, **OPTIONS, **masters)
    twins = [Formula(p.detach(), maximize=i >= half) for i, p in enumerate(params)]
    unsure = [torch.zeros_like(t.w, dtype=torch.bool) for t in twins]
    for step in range(5):
        for half_step in (0, 1):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 1000 * step + 100 * half_step + i, dtype)
            optimizer.second_step() if half_step else optimizer.first_step()
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            assert p.grad is not None
            # fp32 sums of two numbers near 1 err by 1e-7. Below that, the sign may be either one.
            unsure[i] |= twin.step(p.grad).abs() < (1e-6 if dtype is not torch.float64 else 1e-14)
    eps = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    for p, twin, skip in zip(params, twins, unsure, strict=True):
        state = optimizer.state[p]
        assert int(skip.sum()) <= 1 + skip.numel() // 1000, "few elements are left out"
        found = state["master_weight"] if masters else p.detach()
        torch.testing.assert_close(found.double()[~skip], twin.w[~skip], rtol=eps, atol=eps)
        torch.testing.assert_close(state["exp_avg"].double(), twin.m, rtol=1e-5, atol=1e-6)
        assert state.keys() - {"master_weight"} == {"exp_avg"}


def test_rho_zero_is_lion(backend: str) -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), Lion, rho=0.0, backend=backend, **OPTIONS)
    plain = Lion(twin.parameters(), **OPTIONS)
    for step in range(6):
        optimizer.step(nets.closure_for(model, step))
        plain.zero_grad()
        nets.loss_of(twin, step).backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def test_resume_is_bit_equal_and_checkpoints_load_both_ways(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), Lion, rho=0.1, backend=backend, **OPTIONS)
    nets.train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = SAM(other.parameters(), Lion, rho=0.1, backend=backend, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain = Lion(copy.deepcopy(model).parameters(), **OPTIONS)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = SAM(copy.deepcopy(model).parameters(), Lion, rho=0.1, backend=backend, **OPTIONS)
    back.load_state_dict(plain.state_dict())
    for m, o in ((model, optimizer), (other, resumed)):
        nets.train(m, o, range(3, 6))
    assert_same_optimizers(optimizer, resumed)


def test_a_non_finite_gradient_changes_nothing(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), Lion, rho=0.1, backend=backend, **OPTIONS)
    nets.train(model, optimizer, range(2))
    before = copy.deepcopy([p.detach() for p in model.parameters()]), copy.deepcopy(optimizer.state_dict()["state"])
    nets.loss_of(model, 2).backward()
    optimizer.first_step(zero_grad=True)
    nets.loss_of(model, 2).backward()
    next(model.parameters()).grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
    optimizer.second_step()
    assert optimizer.step_was_skipped
    for p, q in zip(model.parameters(), before[0], strict=True):
        assert torch.equal(p, q)
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["exp_avg"], before[1][key]["exp_avg"])


def test_nan_stays_nan_without_the_check(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Lion, rho=0.0, lr=0.1, check_update=False, backend=backend)
    plain = Lion([q], lr=0.1)
    for w in (p, q):
        w.grad = torch.tensor([1.0, float("nan"), -2.0])
    optimizer.step()
    plain.step()
    for w in (p, q):
        torch.testing.assert_close(w.detach(), torch.tensor([0.9, float("nan"), 1.1]), equal_nan=True)


def test_momentum_sam_displaces_along_the_average(backend: str) -> None:
    model = nets.net()
    optimizer = MomentumSAM(model.parameters(), Lion, rho=0.5, backend=backend, **OPTIONS)
    for step in range(3):
        optimizer.step(nets.closure_for(model, step))
    displaced = [p.detach().clone() for p in model.parameters()]
    optimizer.eval()
    v = [optimizer.state[p]["exp_avg"].double() for p in model.parameters()]
    length = torch.stack([x.square().sum() for x in v]).sum().sqrt()
    for p, d, x in zip(model.parameters(), displaced, v, strict=True):
        torch.testing.assert_close(d.double(), p.detach().double() - 0.5 * x / length, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be from 0 to below 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"lr": torch.ones(2)}, "one element"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        Lion([p], **options)
    with pytest.raises(ValueError, match=message):
        SAM([p], Lion, **options)
