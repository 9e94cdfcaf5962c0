"""Weights and groups that users move, cast, add, freeze or load while the optimizer exists."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits, same_bits
from support.draws import values, weights
from support.family import METHODS
from support.nets import loss_of, net, train, two_steps
from torch import nn

from fused_sam import SAM


def pair(backend: str, **options: Any) -> tuple[nn.Module, SAM, nn.Module, SAM]:
    """Return two equal models and their optimizers. Moving weights of the first must not change its results."""
    model, twin = net(), net()
    settings = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, "backend": backend, **options}
    return model, SAM(model.parameters(), **settings), twin, SAM(twin.parameters(), **settings)  # type: ignore[arg-type]


def test_weights_moved_between_steps(backend: str) -> None:
    model, optimizer, twin, other = pair(backend)
    for step in range(4):
        two_steps(model, optimizer, step)
        two_steps(twin, other, step)
        for p in model.parameters():
            p.data = p.data.clone()
    assert_same_bits(model.parameters(), twin.parameters())


def test_weights_moved_while_perturbed(backend: str) -> None:
    """Flattening wrappers move weights at any time. The undo writes to the new memory."""
    model, optimizer, twin, other = pair(backend)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.first_step(zero_grad=True)
        for p in model.parameters():
            p.data = p.data.clone()
        loss_of(model, step).backward()
        optimizer.second_step(zero_grad=True)
        two_steps(twin, other, step)
    assert_same_bits(model.parameters(), twin.parameters())


def test_weights_flattened_into_one_buffer(backend: str) -> None:
    model, optimizer, twin, other = pair(backend)
    two_steps(model, optimizer, 0)
    flat = torch.cat([p.data.reshape(-1) for p in model.parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    two_steps(model, optimizer, 1)
    train(twin, other, range(2))
    assert_same_bits(model.parameters(), twin.parameters())
    assert torch.equal(flat, torch.cat([p.data.reshape(-1) for p in model.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_cast_between_steps(backend: str, dtype: torch.dtype) -> None:
    model, optimizer, _, _ = pair(backend)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    model.to(dtype)
    assert all(p.dtype is dtype for p in model.parameters())
    twin = copy.deepcopy(model)
    fresh = SAM(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        fresh.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    train(model, optimizer, range(2, 4))
    train(twin, fresh, range(2, 4))
    assert_same_bits(model.parameters(), twin.parameters())


def test_weights_cast_at_the_same_address(backend: str) -> None:
    """The second cast may get the memory that the first one freed. An address alone does not identify a tensor."""
    p = nn.Parameter(torch.ones(64, dtype=torch.float64))
    optimizer = SAM([p], rho=0.0, lr=1.0, backend=backend)
    p.grad = torch.ones(64, dtype=torch.float64)
    optimizer.step()
    memory = p.data  # the reference keeps the memory, so that the cast can use its address
    p.grad = None
    p.data = memory.view(torch.float32)[:64]
    with torch.no_grad():
        p.fill_(2.0)
    p.grad = torch.ones(64)
    optimizer.step()
    assert p.dtype is torch.float32 and torch.equal(p, torch.ones(64))


def test_weights_reshaped_at_the_same_address(backend: str) -> None:
    p = nn.Parameter(values((4, 6), 1, torch.float32))
    optimizer = SAM([p], rho=0.5, lr=0.1, backend=backend)
    p.grad = torch.ones(4, 6)
    optimizer.first_step()
    optimizer.second_step()
    p.grad = None
    p.data = p.data[:2]  # pruning leaves fewer elements at the same address
    before = p.detach().clone()
    p.grad = torch.ones(2, 6)
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), before + 0.5 / 12**0.5, rtol=0, atol=1e-6)
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), before - 0.1, rtol=0, atol=1e-6)


def test_weights_changed_to_channels_last_between_steps(backend: str) -> None:
    params, twins = ([nn.Parameter(values((4, 6, 3, 3), 1, torch.float32))] for _ in range(2))
    optimizers = [SAM(w, rho=0.5, lr=0.1, momentum=0.9, backend=backend) for w in (params, twins)]
    for step in range(4):
        if step == 2:
            params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        for w, o in zip((params, twins), optimizers, strict=True):
            for half in (o.first_step, o.second_step):
                w[0].grad = values((4, 6, 3, 3), step, torch.float32)
                if w is params and step >= 2:
                    w[0].grad = w[0].grad.contiguous(memory_format=torch.channels_last)
                half()
    torch.testing.assert_close(params[0], twins[0], rtol=0, atol=1e-6)
    assert params[0].is_contiguous(memory_format=torch.channels_last)


def test_weights_loaded_in_place(backend: str) -> None:
    model, optimizer, twin, other = pair(backend)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2))
    model.load_state_dict(start)
    optimizer.state.clear()
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    assert_same_bits(model.parameters(), twin.parameters())


def test_a_step_starts_from_weights_that_the_user_assigned(backend: str) -> None:
    """Users clamp or average weights after a step. The next step starts from the assigned values."""
    p = nn.Parameter(torch.ones(4))
    optimizer = SAM([p], rho=0.5, lr=0.25, backend=backend)
    for _ in range(2):
        with torch.no_grad():
            p.fill_(3.0)
        p.grad = torch.ones(4)
        optimizer.first_step()
        optimizer.second_step()
        assert torch.equal(p, torch.full((4,), 2.75))


@pytest.mark.parametrize("end", ["second_step", "restore", "unperturbed"])
def test_unperturbed_weights_written_between_the_passes_reach_their_masters(backend: str, end: str) -> None:
    """The masters get the written values, however the step ends, and the next update starts from them."""
    p, q = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "perturb": False}]
    optimizer = SAM(groups, rho=0.5, lr=0.25, backend=backend, master_weights=True)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    optimizer.first_step(zero_grad=True)
    if end == "unperturbed":
        with optimizer.unperturbed(), torch.no_grad():
            q.fill_(3.0)
    else:
        with torch.no_grad():
            q.fill_(3.0)
    optimizer.restore() if end == "restore" else optimizer.second_step()
    q.grad = torch.ones_like(q)
    optimizer.step()
    assert torch.equal(q, torch.full_like(q, 2.75))


def test_add_param_group_mid_training(backend: str) -> None:
    model, twin = net(), net()
    ours, theirs = list(model.parameters()), list(twin.parameters())
    optimizer = SAM(ours[:4], rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = torch.optim.SGD(theirs[:4], lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": ours[4:], "lr": 0.01, "adaptive": True})
            base.add_param_group({"params": theirs[4:], "lr": 0.01})
        optimizer.zero_grad()
        base.zero_grad()
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        optimizer.step()
        base.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    group = optimizer.param_groups[1]
    assert group["rho"] == 0.0 and group["perturb"] is True and group["momentum"] == 0.9
    optimizer.param_groups[1]["rho"] = 0.5
    before = [p.detach().clone() for p in ours]
    loss_of(model, 9).backward()
    optimizer.first_step()
    assert [same_bits(p, b) for p, b in zip(ours, before, strict=True)] == [True] * 4 + [False] * 2


def test_add_param_group_while_perturbed(backend: str) -> None:
    """The new weights were not perturbed. The perturbation of the others is undone as usual."""
    model = net()
    layers = list(model.parameters())
    optimizer = SAM(layers[:4], rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    before = [p.detach().clone() for p in layers]
    loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.add_param_group({"params": layers[4:]})
    optimizer.restore()
    assert_same_bits(layers, before)


@pytest.mark.parametrize("method", ["GSAM", "WSAM", "WSAM coupled", "FriendlySAM", "LookSAM"])
def test_groups_added_and_reordered_while_ascent_gradients_are_kept(backend: str, method: str) -> None:
    """A kept gradient belongs to its weight, not to a position in the groups."""

    def step(change: bool) -> list[torch.Tensor]:
        params = weights([(5,), (5,), (3, 4)], torch.float64)
        groups = [{"params": params[:1]}, {"params": params[1:2]}]
        optimizer = METHODS[method](groups, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
        for half in (0, 1):
            for i, p in enumerate(params[:2]):
                p.grad = values(p.shape, 10 * half + i, p.dtype)
            if half == 0:
                optimizer.first_step(zero_grad=True)
        if change:
            optimizer.add_param_group({"params": params[2:]})
            optimizer.param_groups.reverse()
            params[2].grad = values((3, 4), 30, torch.float64) * 0
        optimizer.second_step()
        assert not optimizer.perturbed and optimizer.stepper.context._kept is None
        return [p.detach() for p in params]

    for found, expected in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_removing_a_perturbed_weight_is_an_error_that_names_it(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, backend=backend)
    loss_of(model, 0).backward()
    optimizer.first_step()
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* was perturbed and has been removed"):
        optimizer.second_step()


def test_group_removed_and_order_changed_between_steps(backend: str) -> None:
    p, q = weights([(5,), (7,)], torch.float32)
    optimizer = SAM([{"params": [p]}, {"params": [q], "lr": 0.5}], rho=0.0, lr=0.25, backend=backend)
    for w in (p, q):
        with torch.no_grad():
            w.fill_(1.0)
        w.grad = torch.ones_like(w)
    optimizer.step()
    optimizer.param_groups.reverse()
    optimizer.step()
    assert torch.equal(p, torch.full((5,), 0.5)) and torch.equal(q, torch.zeros(7))
    del optimizer.param_groups[0]
    optimizer.step()
    assert torch.equal(p, torch.full((5,), 0.25)) and torch.equal(q, torch.zeros(7))


def test_a_weight_moved_from_one_group_to_another_takes_its_options(backend: str) -> None:
    """The parameters keep their order. Only the group of one of them changes."""
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
    optimizer = SAM([{"params": [p, q], "lr": 0.25}, {"params": [], "lr": 0.5}], rho=0.0, backend=backend)
    for w in (p, q):
        w.grad = torch.ones_like(w)
    optimizer.step()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    assert torch.equal(p, torch.full((5,), 0.5)) and torch.equal(q, torch.full((7,), 0.25))


def test_a_parameter_replaced_by_another(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = SAM([p], rho=0.0, lr=0.5, backend=backend)
    p.grad, q.grad = torch.ones(5), torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = q
    optimizer.step()
    assert torch.equal(p, torch.full((5,), 0.5)) and torch.equal(q, torch.full((5,), 0.5))


def test_many_patterns_of_frozen_layers(backend: str) -> None:
    """The gradients are present in more patterns than the optimizer caches tables for."""
    ours, theirs = weights([(7,)] * 6, torch.float32), weights([(7,)] * 6, torch.float32)
    optimizer = SAM(ours, rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for step in [*range(1, 64, 2), *range(0, 64, 3)]:
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            present = bool(step >> i & 1)
            p.grad = values((7,), step + i, torch.float32) if present else None
            q.grad = values((7,), step + i, torch.float32) if present else None
        optimizer.first_step()
        optimizer.second_step()
        base.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_gradients_that_require_grad(backend: str) -> None:
    """backward(create_graph=True) makes gradients with a graph. A step uses only their values."""
    p, q = weights([(5,), (7,)], torch.float32)
    optimizer = SAM([p, q], rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    before = Snapshot(optimizer)
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of the reference cycle once per process
                (p.square().sum() + q.exp().sum()).backward(create_graph=True)
            half()
    optimizer.zero_grad()
    assert not torch.equal(p, before.weights[0])
    assert p.is_leaf and p.grad_fn is None
    assert not optimizer.state[p]["momentum_buffer"].requires_grad


def test_tied_weights_count_once(backend: str) -> None:
    model = net()
    model.head = nn.Linear(16, 3)  # type: ignore[assignment]
    model.head.weight = model[4].weight  # type: ignore[union-attr]
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, backend=backend)
    assert len(optimizer.param_groups[0]["params"]) == 7
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(nn.Sequential(*list(model)[:5]), 0).backward()
    optimizer.first_step()
    optimizer.restore()
    assert_same_bits(model.parameters(), before)


def test_weights_with_a_parametrization(backend: str) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    optimizer = SAM(layer.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    x = values((8, 6), 3, torch.float32)
    losses = []
    for _ in range(20):

        def closure() -> torch.Tensor:
            loss = layer(x).square().mean()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    assert losses[-1] < 0.5 * losses[0]


class Tagged(torch.Tensor):
    """A tensor subclass that overrides nothing."""


def test_parameters_of_a_tensor_subclass(backend: str) -> None:
    p = nn.Parameter(torch.ones(5).as_subclass(Tagged))
    optimizer = SAM([p], rho=0.5, lr=0.5, momentum=0.9, backend=backend)
    for _ in range(2):
        p.grad = torch.ones(5).as_subclass(Tagged)
        optimizer.first_step()
        optimizer.second_step()
    torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), torch.full((5,), 1 - 0.5 - 0.5 * 1.9))
