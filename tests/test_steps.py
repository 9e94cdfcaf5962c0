"""Tests of first_step(), second_step(), step() without a closure and restore(), in every order of calls."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.bits import Snapshot, assert_same_bits, same_bits
from support.draws import values, weights
from support.nets import loss_of, net, train, two_steps
from torch import nn

from fused_sam import SAM


def simple(backend: str, **options: object) -> tuple[nn.Parameter, SAM]:
    p = nn.Parameter(torch.ones(4))
    return p, SAM([p], torch.optim.SGD, backend=backend, **{"rho": 1.0, "lr": 0.5, **options})  # type: ignore[arg-type]


def test_positional_signature_is_that_of_the_public_package(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = SAM([p], torch.optim.SGD, 0.5, True, backend=backend, lr=0.1, momentum=0.9)
    assert optimizer.param_groups[0]["rho"] == 0.5 and optimizer.param_groups[0]["adaptive"] is True
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.defaults["momentum"] == 0.9
    assert SAM([p], lr=0.1).param_groups[0]["rho"] == 0.05


def test_first_step_perturbs_and_second_step_updates(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.full((4,), 3.0)
    optimizer.first_step()
    assert optimizer.perturbed
    torch.testing.assert_close(p.detach(), torch.full((4,), 1.5))  # 1 * 3 / ||(3, 3, 3, 3)||
    assert p.grad is not None
    p.grad = torch.full((4,), 2.0)
    optimizer.second_step()
    assert not optimizer.perturbed
    assert torch.equal(p, torch.zeros(4))
    assert p.grad is not None
    assert float(optimizer.grad_norm) == 6.0 and float(optimizer.update_norm) == 4.0


def test_zero_grad_clears_gradients_after_a_step(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.ones(4)
    optimizer.first_step(zero_grad=True)
    assert p.grad is None
    p.grad = torch.ones(4)
    optimizer.second_step(zero_grad=True)
    assert p.grad is None


def test_step_after_first_step_is_the_second_step(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.ones(4)
    optimizer.first_step(zero_grad=True)
    p.grad = torch.ones(4)
    assert optimizer.step() is None
    assert torch.equal(p, torch.full((4,), 0.5)) and not optimizer.perturbed


def test_step_without_first_step_is_a_base_step(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.5))


def test_restore_undoes_the_perturbation_and_the_next_step_is_complete(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1, momentum=0.9, backend=backend)
    other = SAM(twin.parameters(), rho=0.3, lr=0.1, momentum=0.9, backend=backend)
    before = Snapshot(optimizer)
    optimizer.restore()  # nothing to undo
    loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    before.assert_unchanged()
    assert not optimizer.perturbed
    two_steps(model, optimizer, 0)
    two_steps(twin, other, 0)
    assert_same_bits(model.parameters(), twin.parameters())


def test_the_norm_is_global_over_perturbed_groups_only(backend: str) -> None:
    p, q, r = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [p]}, {"params": [q]}, {"params": [r], "perturb": False}]
    optimizer = SAM(groups, rho=1.0, lr=1.0, backend=backend)
    p.grad, q.grad, r.grad = torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([100.0])
    optimizer.first_step()
    assert float(optimizer.grad_norm) == 5.0
    torch.testing.assert_close(torch.cat([p, q, r]).detach(), torch.tensor([0.6, 0.8, 0.0]))
    optimizer.second_step()
    assert torch.equal(torch.cat([p, q, r]).detach(), torch.tensor([-3.0, -4.0, -100.0]))


def test_non_finite_gradient_of_an_unperturbed_group_skips_in_the_second_pass(backend: str) -> None:
    p, r = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM([{"params": [p]}, {"params": [r], "perturb": False}], rho=1.0, lr=1.0, backend=backend)
    p.grad, r.grad = torch.ones(2), torch.tensor([1.0, float("nan")])
    optimizer.first_step()
    assert not optimizer.skipped  # the norm leaves this group out
    optimizer.second_step()
    assert optimizer.skipped
    assert torch.equal(p, torch.ones(2)) and torch.equal(r, torch.ones(2))


def test_options_changed_between_steps_take_effect_at_once(backend: str) -> None:
    p, optimizer = simple(backend)
    group = optimizer.param_groups[0]
    p.grad = torch.ones(4)
    group["rho"] = 4.0
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 3.0))
    group["rho"] = 0.0  # a change between the passes does not affect the undo
    group["lr"] = 0.25
    optimizer.second_step()
    assert torch.equal(p, torch.full((4,), 0.75))
    group["momentum"] = 0.5
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[p]
    assert torch.equal(p, torch.full((4,), 0.5))
    group["momentum"] = 0.0
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.25))
    group["perturb"] = False
    optimizer.first_step()
    assert torch.equal(p, torch.full((4,), 0.25))


def test_momentum_switched_off_and_on_is_as_in_sgd(backend: str) -> None:
    ours, theirs = weights([(9,)], torch.float32), weights([(9,)], torch.float32)
    optimizer = SAM(ours, rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for step in range(9):
        for o in (optimizer, base):
            o.param_groups[0]["momentum"] = 0.0 if 3 <= step < 6 else 0.9
        ours[0].grad = values((9,), step, torch.float32)
        theirs[0].grad = values((9,), step, torch.float32)
        optimizer.step()
        base.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)


def test_requires_grad_toggled_mid_training(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for step in range(8):
        for m in (model, twin):
            for p in list(m.parameters())[:2]:
                p.requires_grad_(step // 2 % 2 == 0)
        two_steps(model, optimizer, step)
        base.zero_grad()
        loss_of(twin, step).backward()
        base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_steps_under_inference_and_grad_modes(backend: str) -> None:
    p, optimizer = simple(backend, momentum=0.9)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            p.grad = torch.ones(4)
            optimizer.first_step()
            optimizer.second_step()
        assert p.requires_grad and p.is_leaf and p.grad_fn is None
        assert not optimizer.state[p]["momentum_buffer"].requires_grad


def test_no_reference_to_a_gradient_is_kept(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    train(model, optimizer, range(2))
    for half in (optimizer.first_step, optimizer.second_step):
        loss_of(model, 3).backward()
        alive = [weakref.ref(p.grad) for p in model.parameters()]
        assert all(ref() is not None for ref in alive)
        half(zero_grad=True)
        assert not any(ref() is not None for ref in alive)


def test_skipped_is_true_then_false_again(backend: str) -> None:
    p, optimizer = simple(backend)
    assert optimizer.skipped.dtype is torch.bool and optimizer.skipped.dim() == 0
    assert not optimizer.skipped
    for value, skips in ((1.0, False), (float("nan"), True), (1.0, False)):
        p.grad = torch.full((4,), value)
        optimizer.step()
        assert bool(optimizer.skipped) is skips


def test_a_later_step_does_not_change_the_returned_values(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.full((4,), float("nan"))
    optimizer.step()
    skipped, norm = optimizer.skipped, optimizer.update_norm
    p.grad = torch.ones(4)
    optimizer.step()
    assert bool(skipped) and bool(norm.isnan())


def test_backup_is_not_in_state(backend: str) -> None:
    p, optimizer = simple(backend, momentum=0.9)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.first_step()
    assert set(optimizer.state) == {p} and optimizer.state[p].keys() == {"momentum_buffer"}
    optimizer.second_step()
    assert optimizer.state[p].keys() == {"momentum_buffer"}


def test_plain_sgd_has_no_state(backend: str) -> None:
    p, optimizer = simple(backend)
    p.grad = torch.ones(4)
    optimizer.first_step()
    optimizer.second_step()
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_lr_as_a_tensor(backend: str, dim: int) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = SAM([p], rho=0.0, lr=torch.full((1,) * dim, 0.5), backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.5))
    optimizer.param_groups[0]["lr"].fill_(0.25)  # as a scheduler changes it
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.25))


def test_two_optimizers_over_one_model(backend: str) -> None:
    """Each optimizer undoes its own perturbation. Their steps may be nested, not interleaved."""
    model = net()
    layers = list(model.parameters())
    first = SAM(layers[:2], rho=0.1, lr=0.1, backend=backend)
    second = SAM(layers[2:], rho=0.1, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in layers]
    loss_of(model, 0).backward()
    first.first_step()
    second.first_step()
    first.restore()
    second.restore()
    assert_same_bits(layers, before)
    assert same_bits(layers[0], before[0])
