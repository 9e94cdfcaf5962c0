"""scaler.unscale_() before first_step(), between the passes, and in programs with two GradScaler entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import Snapshot
from support.family import METHODS, NEED_ADAM, ONE_PASS, built
from support.nets import loss_of, net
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

import fused_sam
from fused_sam import SAM, MicrobatchSAM

SCALE = 2.0**10
TWO_PASSES = sorted(METHODS.keys() - set(ONE_PASS))


def step_with_unscaling_first(
    model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, bad: float = 1.0
) -> None:
    scaler.scale(loss_of(model, step)).backward()
    scaler.unscale_(optimizer)
    if optimizer.needs_second_pass:
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, step) * bad).backward()
    scaler.step(optimizer.base_optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", TWO_PASSES)
def test_unscaling_before_first_step_gives_the_steps_without_a_scaler(backend: str, method: str) -> None:
    extra = {"eps": 0.0, "max_norm": 0.5} if method == "ASAM" else {"eps": 0.0}
    if method in NEED_ADAM:
        extra = {}  # eps is Adam's
    (model, optimizer), (twin, other) = built(method, backend, **extra), built(method, backend, **extra)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    for step in range(5):
        step_with_unscaling_first(model, optimizer, scaler, step)
        loss_of(twin, step).backward()
        if other.needs_second_pass:
            other.first_step(zero_grad=True)
            loss_of(twin, step).backward()
        other.step()
        other.zero_grad()
        # A power of two scales exactly. A factor within a fused multiply-add may round once more.
        torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-5, atol=0)
    assert scaler.get_scale() == 2 * SCALE
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_a_base_optimizer_with_its_own_step_gets_unscaled_gradients(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), torch.optim.RMSprop, rho=0.1, lr=1e-3, backend=backend)
    other = SAM(twin.parameters(), torch.optim.RMSprop, rho=0.1, lr=1e-3, backend=backend)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        step_with_unscaling_first(model, optimizer, scaler, step)
        loss_of(twin, step).backward()
        other.first_step(zero_grad=True)
        loss_of(twin, step).backward()
        other.second_step(zero_grad=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("check_update", [True, False])
def test_second_gradients_that_the_scaler_has_not_checked_are_checked(backend: str, check_update: bool) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, check_update=check_update, backend=backend)
    scaler = GradScaler("cpu", init_scale=SCALE)
    step_with_unscaling_first(model, optimizer, scaler, 0)
    before = Snapshot(optimizer)
    step_with_unscaling_first(model, optimizer, scaler, 1, bad=torch.inf)
    before.assert_unchanged()
    assert optimizer.step_was_skipped


def test_restoring_after_unscaling_keeps_the_scale_of_the_next_gradients(backend: str) -> None:
    """GradScaler still counts the optimizer as unscaled then, until update()."""
    model, twin = net(), net()
    optimizer, other = (SAM(m.parameters(), rho=0.1, lr=0.1, eps=0.0, backend=backend) for m in (model, twin))
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    scaler.scale(loss_of(model, 1)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    loss_of(twin, 1).backward()
    other.first_step(zero_grad=True)
    loss_of(twin, 1).backward()
    other.second_step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_unscaling_both_gradients_with_an_update_between_works(backend: str) -> None:
    model, twin = net(), net()
    optimizer, other = (SAM(m.parameters(), rho=0.1, lr=0.1, eps=0.0, backend=backend) for m in (model, twin))
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=1)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1e3)
        optimizer.first_step(zero_grad=True)
        scaler.update()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_of(twin, step).backward()
        other.first_step(zero_grad=True)
        loss_of(twin, step).backward()
        other.second_step(zero_grad=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["no unscale_", "between", "first", "told"])
def test_both_norms_are_without_the_scale(backend: str, order: str) -> None:
    model, twin = net(), net()
    optimizer, other = (SAM(m.parameters(), rho=0.1, lr=0.1, max_norm=1e3, backend=backend) for m in (model, twin))
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    if order == "first":
        scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True, grad_scale=scaler.get_scale() if order == "told" else None)
    early = optimizer.grad_norm
    scaler.scale(loss_of(model, 0)).backward()
    if order == "between":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    loss_of(twin, 0).backward()
    other.first_step(zero_grad=True)
    factor = SCALE if order in ("no unscale_", "between") else 1.0
    torch.testing.assert_close(early, other.grad_norm * factor, rtol=1e-5, atol=0)  # not known before the update
    loss_of(twin, 0).backward()
    other.second_step()
    torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.update_norm, other.update_norm, rtol=1e-5, atol=0)


def test_unscaling_a_part_of_a_sum_is_an_error(backend: str) -> None:
    model = net()
    optimizer = MicrobatchSAM(model.parameters(), num_microbatches=2, rho=0.1, lr=0.1, backend=backend)
    before = Snapshot(optimizer)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    optimizer.first_step()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) was called between two micro-batches"):
        optimizer.next_microbatch()
    optimizer.restore()
    before.assert_unchanged()


def test_a_disabled_scaler_and_other_optimizers_are_left_alone() -> None:
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(plain)
    scaler.step(plain)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    GradScaler("cpu", enabled=False).unscale_(optimizer)
    assert not optimizer.stepper.grads_unscaled


def test_a_subclass_of_the_scaler_with_its_own_unscale_reports_too() -> None:
    class Own(GradScaler):
        def unscale_(self, optimizer: Any) -> None:
            super().unscale_(optimizer)

    model = net()
    optimizer = fused_sam.SAM(model.parameters(), rho=0.1, lr=0.1)
    scaler = Own("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    assert optimizer.stepper.grads_unscaled and optimizer.stepper.noted_scale == SCALE


def public_grad_norm(groups: list[dict[str, Any]]) -> Tensor:
    """Return the norm that the public SAM package computes."""
    found = [
        ((torch.abs(p) if group["adaptive"] else 1.0) * p.grad).norm(p=2)
        for group in groups
        for p in group["params"]
        if p.grad is not None
    ]
    return torch.norm(torch.stack(found), p=2)


def test_grad_norm_of_the_present_gradients_is_the_public_packages(backend: str) -> None:
    model = net()
    first, *others = model.parameters()
    groups = [{"params": [first], "adaptive": True, "eta": 0.1, "rho": 0.5}, {"params": others}]
    optimizer = SAM(groups, lr=0.1, backend=backend)
    assert optimizer._grad_norm() == 0
    loss_of(model, 0).backward()
    others[0].grad = None
    assert torch.equal(optimizer._grad_norm(), public_grad_norm(optimizer.param_groups))
