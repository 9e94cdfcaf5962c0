"""Errors of options out of range, and details of ASAM, GCSAM, LookSAM and WSAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import nets
from support.family import built, train
from torch import nn

import fused_sam
from fused_sam.schedule import AdaptiveSchedule


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: fused_sam.ASAM(p, scale="biases"), ValueError, "scale must be"),
        (lambda p: fused_sam.MicrobatchSAM(p, num_microbatches=0), ValueError, "num_microbatches must be at least 1"),
        (lambda p: fused_sam.MicrobatchSAM(p, num_microbatches=2.0), TypeError, "must be a whole number"),
        (lambda p: fused_sam.ESAM(p, beta=0.0), ValueError, "beta must be above 0"),
        (lambda p: fused_sam.ESAM(p, beta=1.1), ValueError, "beta must be"),
        (lambda p: fused_sam.ESAM(p, gamma=float("nan")), ValueError, "gamma must be"),
        (lambda p: fused_sam.ESAM(p, gamma="all"), TypeError, "gamma must be a number"),
        (lambda p: fused_sam.ESAM(p, mask="rows"), ValueError, "mask must be"),
        (lambda p: fused_sam.ESAM(p, mask="tensors", schedule=AdaptiveSchedule(10)), ValueError, 'use mask="elements"'),
        (lambda p: fused_sam.LookSAM(p, k=0), ValueError, "k must be at least 1"),
        (lambda p: fused_sam.LookSAM(p, k=True), TypeError, "k must be a whole number"),
        (lambda p: fused_sam.LookSAM(p, alpha=-0.1), ValueError, "alpha must be from 0 to 1"),
        (lambda p: fused_sam.GSAM(p, alpha=1.5), ValueError, "alpha must be from 0 to 1"),
        (lambda p: fused_sam.FriendlySAM(p, sigma=-1), ValueError, "sigma must be"),
        (lambda p: fused_sam.FriendlySAM(p, lmbda=1.01), ValueError, "lmbda must be from 0 to 1"),
        (lambda p: fused_sam.WSAM(p, gamma=1.0), ValueError, "gamma must be at least 0 and below 1"),
        (lambda p: fused_sam.WSAM(p, stochastic_rounding=True), ValueError, "decouple=False"),
        (lambda p: fused_sam.MomentumSAM(p), ValueError, "group 0 has no momentum"),
        (lambda p: fused_sam.MomentumSAM(p, torch.optim.Adam, betas=(0.0, 0.9)), ValueError, "group 0 has no momentum"),
        (lambda p: fused_sam.MomentumSAM(p, torch.optim.RMSprop, momentum=0.9), TypeError, "SGD, Adam, AdamW or Lion"),
        (
            lambda p: fused_sam.MomentumSAM(p, momentum=0.9, schedule=AdaptiveSchedule(10)),
            ValueError,
            "before there are",
        ),
    ],
)
def test_options_out_of_range_are_errors(make: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        make([p])
    assert torch.equal(p, torch.ones(3))


def test_asam_leaves_norm_layers_and_biases_unscaled(backend: str) -> None:
    w, b = nn.Parameter(torch.tensor([[3.0]])), nn.Parameter(torch.tensor([5.0]))
    optimizer = fused_sam.ASAM([{"params": [w]}, {"params": [b]}], rho=1.0, eta=1.0, lr=0.1, backend=backend)
    w.grad, b.grad = torch.tensor([[0.75]]), torch.tensor([4.0])
    optimizer.first_step()  # T g = (4 * 0.75, 4): norm 5;  e = T^2 g / 5
    torch.testing.assert_close(torch.cat([w.flatten(), b]).detach(), torch.tensor([3 + 16 * 0.75 / 5, 5 + 4 / 5]))
    optimizer.restore()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # the number of groups changes
    optimizer.first_step()
    torch.testing.assert_close(b.detach(), torch.tensor([5.8]))


def test_asam_of_a_group_that_is_not_adaptive(backend: str) -> None:
    w = nn.Parameter(torch.tensor([[3.0]]))
    optimizer = fused_sam.ASAM([{"params": [w], "adaptive": False}], rho=1.0, lr=0.1, backend=backend)
    w.grad = torch.tensor([[7.0]])
    optimizer.first_step()
    assert w.item() == pytest.approx(4.0)


def test_gcsam_of_a_convolution_and_bf16_gradients(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(2, 3, 3, 1, dtype=dtype).to(memory_format=torch.channels_last))
        optimizer = fused_sam.GCSAM([p], rho=2.0, lr=0.1, backend=backend)
        p.grad = torch.randn_like(p)
        g = p.grad.double()
        c = g - g.mean((1, 2, 3), keepdim=True)
        optimizer.first_step()
        torch.testing.assert_close(
            p.detach().double(), 2 * c / c.norm(), rtol=0, atol=2e-2 if dtype.itemsize == 2 else 1e-6
        )
        assert abs(float(p.detach().double().norm()) - 2) < (1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_looksam_keeps_an_fp32_direction_of_low_precision_gradients(backend: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(37, dtype=dtype))
    optimizer = fused_sam.LookSAM([p], k=1, lr=0.1, rho=8.0, backend=backend)
    for _ in range(2):  # the second direction replaces the first
        g, h = torch.randn(37, dtype=dtype), torch.randn(37, dtype=dtype)
        p.grad = g.clone()
        optimizer.first_step()
        p.grad = h.clone()
        optimizer.second_step()
        a, b = g.double(), h.double()
        kept = optimizer.state[p]["sharpness_direction"]
        assert kept.dtype is torch.float32
        torch.testing.assert_close(kept.double(), b - (a @ b) / (a @ a) * a, rtol=0, atol=2e-6)  # fp32 near 2


def test_looksam_starts_with_two_passes_after_loading_another_optimizers_state(backend: str) -> None:
    model = nets.net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nets.train_plain(model, base, range(2))
    optimizer = fused_sam.LookSAM(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["looksam_step"] == 1
    for entry in saved["state"].values():
        del entry["sharpness_direction"]
    optimizer.load_state_dict(saved)
    passes: list[int] = []
    for step in range(2):
        optimizer.zero_grad()
        optimizer.step(nets.closure_for(model, step, passes))
    assert passes == [0, 0, 1]


def test_wsam_clips_gradient_and_sharpness_by_one_factor(backend: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = fused_sam.WSAM([p], gamma=0.75, max_norm=1.0, lr=0.5, backend=backend)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.first_step()
    p.grad = torch.tensor([3.0, 6.0])
    optimizer.second_step()
    # g = (3, 4) and the sharpness (0, 2), whose weight is 3, are both clipped by 1/5.
    torch.testing.assert_close(p.detach(), -0.5 * torch.tensor([3.0, 4.0 + 3 * 2.0]) / 5, rtol=1e-5, atol=0)


def test_methods_keep_gradients_no_longer_than_a_step(backend: str) -> None:
    for method in ("GSAM", "LookSAM", "FriendlySAM", "WSAM"):
        model, optimizer = built(method, backend)
        train(model, optimizer, range(1))
        assert optimizer.stepper.context._kept is None
        nets.loss_of(model, 1).backward()
        optimizer.first_step()
        assert method == "LookSAM" or all(p.grad is None for p in model.parameters())
        optimizer.restore()
        assert optimizer.stepper.context._kept is None
