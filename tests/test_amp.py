"""Tests of torch.amp.GradScaler and autocast. The first pass needs no unscaling, because g / ||g|| has no scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.nets import loss_of, net, two_steps
from torch.amp import GradScaler

from fused_sam import SAM

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2}),
}


def scaled_steps(model: torch.nn.Module, optimizer: SAM, scaler: GradScaler, step: int, unscale: bool = False) -> None:
    scaler.scale(loss_of(model, step)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, step)).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize(("cls", "options"), BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("unscale", [False, True])
def test_a_power_of_two_as_scale_changes_nothing(
    backend: str, cls: Any, options: dict[str, Any], unscale: bool
) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), cls, rho=0.1, eps=0.0, backend=backend, **options)
    other = SAM(twin.parameters(), cls, rho=0.1, eps=0.0, backend=backend, **options)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        scaled_steps(model, optimizer, scaler, step, unscale)
        two_steps(twin, other, step)
    # Scaling by a power of two is exact. Only the factor of a fused multiply-add may round once more.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert scaler.get_scale() == 2.0**10
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize(("cls", "options"), BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("unscale", [False, True])
def test_overflow_skips_the_step_and_lowers_the_scale(
    backend: str, cls: Any, options: dict[str, Any], half: str, unscale: bool
) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), cls, rho=0.1, backend=backend, **options)
    other = SAM(twin.parameters(), cls, rho=0.1, backend=backend, **options)
    scaler = GradScaler("cpu", init_scale=4.0)
    before = Snapshot(optimizer)
    for this in ("first", "second"):
        bad = float("inf") if this == half else 1.0
        scaler.scale(loss_of(model, 0) * bad).backward()
        if this == "first":
            optimizer.first_step(zero_grad=True)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before.assert_unchanged()
    assert optimizer.skipped and not optimizer.perturbed
    assert scaler.get_scale() == (2.0 if half == "second" else 4.0)
    scaled_steps(model, optimizer, scaler, 1)
    two_steps(twin, other, 1)
    assert not optimizer.skipped
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_disabled_scaler_is_transparent(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, backend=backend)
    other = SAM(twin.parameters(), rho=0.1, lr=0.1, backend=backend)
    scaler = GradScaler("cpu", enabled=False)
    scaled_steps(model, optimizer, scaler, 0)
    two_steps(twin, other, 0)
    assert_same_bits(model.parameters(), twin.parameters())


def test_a_scaled_step_without_perturbation_is_a_base_step(backend: str) -> None:
    """The scaler's usual loop without a perturbation takes a base step."""
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
    scaler = GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        base.zero_grad()
        loss_of(twin, step).backward()
        base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_autocast_with_fp32_weights(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_bf16_weights_train(backend: str) -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)

    def closure() -> torch.Tensor:
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_unscaling_twice_is_torchs_error_and_changes_nothing(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    two_steps(model, optimizer, 0)
    before = Snapshot(optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.unscale_(optimizer)  # allowed without effect, because g / ||g|| has no scale
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, 1)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    optimizer.restore()
    before.assert_unchanged()
    scaler.update()  # ends the step for the scaler too
    optimizer.zero_grad()
    scaled_steps(model, optimizer, scaler, 1, unscale=True)
    assert not optimizer.skipped


def test_a_scheduler_can_see_a_skipped_step(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    rates = []
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        optimizer.first_step(zero_grad=True)
        (scaler.scale(loss_of(model, step)) * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (step == 1)
        if not optimizer.step_was_skipped:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.05, 0.05, 0.025, 0.0125]


def test_a_closure_through_the_scaler_is_an_error(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**10)

    def closure() -> torch.Tensor:
        loss = scaler.scale(loss_of(model, 0))
        loss.backward()
        return loss

    for waiting in (False, True):  # True if the scaler finds a first gradient
        if waiting:
            closure()
        else:
            scaler.scale(torch.ones(()))
        before = Snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"GradScaler.step\(optimizer, closure\) cannot work: .*sam_step"):
            scaler.step(optimizer, closure)
        before.assert_unchanged()
        scaler.update(2.0**10)
        optimizer.zero_grad()
    scaled_steps(model, optimizer, scaler, 0)  # the failed calls have left nothing behind


def test_a_scaled_step_without_any_gradient_changes_nothing(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    before = Snapshot(optimizer)
    optimizer.first_step(zero_grad=True)
    scaler.step(optimizer)
    before.assert_unchanged()
    assert not optimizer.step_was_skipped
