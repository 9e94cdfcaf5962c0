"""max_norm clips the second gradient to a global norm within the update, as clip_grad_norm_ does before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.bits import Snapshot
from support.draws import doubled, draw_passes, take_steps, weights
from support.nets import loss_of, net
from torch import nn
from torch.amp import GradScaler

from fused_sam import SAM

SHAPES = [(7,), (33, 3), (), (0,), (16385,)]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "wrapped": (torch.optim.RMSprop, {"lr": 0.01}),
}


@pytest.mark.parametrize("max_norm", [0.5, 1e4], ids=["clips", "does not clip"])
@pytest.mark.parametrize(("cls", "options"), BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_max_norm_equals_clip_grad_norm_before_the_update(
    backend: str, dtype: torch.dtype, cls: Any, options: dict[str, Any], max_norm: float
) -> None:
    params = weights(SHAPES, dtype)
    twin = doubled(params)
    optimizer = SAM([{"params": params[:2], "maximize": cls is torch.optim.SGD}, {"params": params[2:]}], cls, rho=0.1,
                    max_norm=max_norm, backend=backend, **options)  # fmt: skip
    other = SAM([{"params": twin[:2], "maximize": cls is torch.optim.SGD}, {"params": twin[2:]}], cls, rho=0.1,
                backend="reference", **options)  # fmt: skip
    for both in draw_passes(params, 3):
        first, second = ([g.double().clone() for g in one] for one in both)
        take_steps(optimizer, params, [both])
        norm = nn.utils.get_total_norm(second)
        scale = min(1.0, max_norm / (float(norm) + 1e-6))
        take_steps(other, twin, [(first, [g * scale for g in second])])
        assert float(optimizer.update_norm) == pytest.approx(float(norm), rel=1e-5), "the norm before clipping"
    for p, q in zip(params, twin, strict=True):
        # The limit is fp32's rounding in three steps of numbers near 1. RMSprop and Adam divide by small roots.
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("cls", "options"), BASES.values(), ids=BASES.keys())
def test_under_a_loss_scale(backend: str, cls: Any, options: dict[str, Any], unscale: bool) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), cls, rho=0.1, max_norm=0.05, backend=backend, **options)
    other = SAM(twin.parameters(), cls, rho=0.1, max_norm=0.05, backend=backend, **options)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        other.first_step(zero_grad=True)
        loss_of(twin, step).backward()
        other.second_step(zero_grad=True)
        assert float(optimizer.update_norm) == pytest.approx(float(other.update_norm), rel=1e-5)
        assert float(optimizer.update_norm) > 0.05
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # Scaling by a power of two is exact. A fused multiply-add may round once more, and Adam's ratio amplifies that.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6)


def test_an_inf_is_skipped_and_not_clipped(backend: str) -> None:
    params = weights(SHAPES, torch.float32)
    optimizer = SAM(params, rho=0.1, lr=0.1, momentum=0.9, max_norm=1.0, check_update=False, backend=backend)
    take_steps(optimizer, params, draw_passes(params, 1))
    before = Snapshot(optimizer)
    ((first, second),) = draw_passes(params, 1, seed=3)
    second[1][4, 2] = float("inf")
    take_steps(optimizer, params, [(first, second)])
    assert optimizer.skipped
    before.assert_unchanged()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), "1"])
def test_a_max_norm_out_of_range_is_an_error(max_norm: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="max_norm must be"):
        SAM(weights([(3,)], torch.float32), lr=0.1, max_norm=max_norm)


def test_copies_clip_too() -> None:
    params = weights([(5,)], torch.float32)
    optimizer = copy.deepcopy(SAM(params, lr=1.0, rho=0.0, max_norm=0.5))
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    p.grad = torch.full_like(p, 9.0)
    optimizer.step()
    assert float((p.detach() - before).norm()) == pytest.approx(0.5, rel=1e-5)
