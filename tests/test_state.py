"""Tests of saving, loading and copying: resume, deepcopy, pickle, and checkpoints of torch.optim and other packages."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import pytorch_optimizer
import torch
from support.bits import Snapshot, assert_same_optimizers, same_bits
from support.draws import values, weights
from support.nets import closure_for, groups_of, loss_of, net, train, train_plain, two_steps
from torch import nn
from torch.optim import Optimizer

from fused_sam import SAM

SGD = torch.optim.SGD
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def trained(backend: str, steps: int = 3, **options: Any) -> tuple[nn.Module, SAM]:
    model = net()
    optimizer = SAM(model.parameters(), SGD, rho=0.1, backend=backend, **{**OPTIONS, **options})
    train(model, optimizer, range(steps))
    return model, optimizer


def test_sgd_continues_from_a_sam_checkpoint(backend: str) -> None:
    model, optimizer = trained(backend)
    twin = copy.deepcopy(model)
    base = SGD(twin.parameters(), lr=0.5, foreach=False)
    base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert base.param_groups[0]["momentum"] == 0.9 and base.param_groups[0]["lr"] == 0.1
    optimizer.param_groups[0]["rho"] = 0.0
    for step in range(3, 6):
        optimizer.step(closure_for(model, step))
    train_plain(twin, base, range(3, 6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_sam_continues_from_an_sgd_checkpoint(backend: str) -> None:
    model = net()
    base = SGD(model.parameters(), foreach=False, **OPTIONS)
    train_plain(model, base, range(3))
    twin = copy.deepcopy(model)
    optimizer = SAM(twin.parameters(), SGD, rho=0.25, adaptive=True, eta=0.5, lr=0.5, backend=backend)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"], group["perturb"]) == (0.25, True, 0.5, True)
    assert group["lr"] == 0.1 and group["momentum"] == 0.9
    group["rho"] = 0.0
    train_plain(model, base, range(3, 6))
    for step in range(3, 6):
        optimizer.step(closure_for(twin, step))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"adaptive": True}], ids=str)
def test_resume_is_bit_equal(backend: str, options: dict[str, Any]) -> None:
    model, optimizer = trained(backend, **options)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved_model, saved = torch.load(file)
    twin = net(seed=5)
    twin.load_state_dict(saved_model)
    other = SAM(twin.parameters(), SGD, lr=9.0, backend=backend)  # every option comes from the checkpoint
    other.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_optimizers(optimizer, other)


def test_roll_back_in_place_is_bit_equal(backend: str) -> None:
    """Weights and state are loaded into the same objects. Tables that point to the old state must not be used."""
    model, optimizer = trained(backend)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    after = Snapshot(optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(3, 6))
    after.assert_unchanged()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("calls", ["two steps", "closure"])
def test_copies_are_independent_and_continue_bit_equal(backend: str, how: str, calls: str) -> None:
    model, optimizer = trained(backend)
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in other.param_groups[0]["params"]}
    before = Snapshot(other)
    for step in range(3, 6):
        if calls == "closure":
            optimizer.step(closure_for(model, step))
        else:
            two_steps(model, optimizer, step)
    before.assert_unchanged()  # a copy shares nothing
    for step in range(3, 6):
        if calls == "closure":
            other.step(closure_for(twin, step))
        else:
            two_steps(twin, other, step)
    assert_same_optimizers(optimizer, other)


def test_a_scheduler_copied_with_the_optimizer_belongs_to_the_copy(backend: str) -> None:
    model, optimizer = trained(backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    twin, other, other_scheduler = copy.deepcopy((model, optimizer, scheduler))
    assert other_scheduler.optimizer is other
    two_steps(twin, other, 4)
    two_steps(model, optimizer, 4)
    assert_same_optimizers(optimizer, other)
    other.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_checkpoint_of_the_public_package_with_backups_in_it(backend: str) -> None:
    """The public package keeps `old_p`, the weights before the perturbation, or `e_w` in the base optimizer's state."""
    model, optimizer = trained(backend)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry, p in zip(saved["state"].values(), model.parameters(), strict=True):
        entry["old_p"] = entry["e_w"] = p.detach().clone()
    for group in saved["param_groups"]:
        for ours in ("eta", "perturb"):
            del group[ours]  # options that the public package does not have
    twin = copy.deepcopy(model)
    other = SAM(twin.parameters(), SGD, lr=0.3, backend=backend)
    other.load_state_dict(saved)
    assert all(entry.keys() == {"momentum_buffer"} for entry in other.state.values())
    assert "old_p" in saved["state"][0]  # loading does not change the caller's dict
    train(model, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    assert_same_optimizers(optimizer, other)


def test_checkpoint_of_pytorch_optimizers_sam(backend: str) -> None:
    model, twin = net(), net()
    theirs = pytorch_optimizer.SAM(model.parameters(), SGD, rho=0.1, **OPTIONS)
    for step in range(3):
        closure_for(model, step)()
        theirs.step(closure_for(model, step))
        theirs.zero_grad()
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(twin.parameters(), SGD, lr=0.3, backend=backend)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for step in range(3, 6):
        closure_for(model, step)()
        theirs.step(closure_for(model, step))
        theirs.zero_grad()
        two_steps(twin, optimizer, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_negative_zero_in_a_checkpoint_is_momentum_and_no_first_step(backend: str) -> None:
    """SGD with maximize makes momentum of -0.0 for a gradient of 0. With dampening, it must not start again."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}
    p, q = weights([(4,)], torch.float32) + weights([(4,)], torch.float32)
    base = SGD([p], foreach=False, **options)
    p.grad = torch.tensor([0.0, 1.0, -1.0, 0.0])
    base.step()
    assert base.state[p]["momentum_buffer"].signbit().tolist() == [True, True, False, True]
    with torch.no_grad():
        q.copy_(p)
    optimizer = SAM([q], SGD, rho=0.0, backend=backend, **options)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    for w, o in ((p, base), (q, optimizer)):
        w.grad = torch.ones(4)
        o.step()
    torch.testing.assert_close(q, p, rtol=0, atol=1e-6)


def test_state_that_the_user_cleared_starts_again(backend: str) -> None:
    p, q = weights([(9,)], torch.float32) + weights([(9,)], torch.float32)
    optimizer = SAM([p], rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = SGD([q], lr=0.1, momentum=0.9, foreach=False)
    for step in range(6):
        for w, o in ((p, optimizer), (q, base)):
            w.grad = values((9,), step, torch.float32)
            o.step()
            if step == 2:
                o.state.clear()
            if step == 4:
                del o.state[w]["momentum_buffer"]
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_state_cleared_after_its_first_step_starts_again(backend: str, cls: type[Optimizer]) -> None:
    """Clearing state after each step leaves every step a first step, as with the base optimizer."""
    p, q = weights([(9,)], torch.float32) + weights([(9,)], torch.float32)
    options: dict[str, Any] = {"lr": 0.1} if cls is torch.optim.AdamW else {"lr": 0.1, "momentum": 0.9}
    optimizer, base = SAM([p], cls, rho=0.0, backend=backend, **options), cls([q], **options)
    for step in range(3):
        for w, o in ((p, optimizer), (q, base)):
            w.grad = values((9,), step, torch.float32)
            o.step()
            o.state.clear()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["same", "bf16", "transposed", "fp64"])
def test_buffers_replaced_by_the_user_are_used(backend: str, layout: str) -> None:
    p, q = weights([(6, 5)], torch.float32) + weights([(6, 5)], torch.float32)
    optimizer = SAM([p], rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = SGD([q], lr=0.1, momentum=0.9, foreach=False)
    mine = values((6, 5), 50, torch.float32).bfloat16()  # values that every dtype can hold
    new = {
        "same": mine.float(),
        "bf16": mine.clone(),
        "transposed": mine.float().t().contiguous().t(),
        "fp64": mine.double(),
    }[layout]
    for step in range(4):
        if step == 2:
            optimizer.state[p]["momentum_buffer"] = new
            base.state[q]["momentum_buffer"] = mine.float()
        for w, o in ((p, optimizer), (q, base)):
            w.grad = values((6, 5), step, torch.float32)
            o.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_buffers_written_in_place_by_the_user_are_used(backend: str) -> None:
    p, q = weights([(9,)], torch.float32) + weights([(9,)], torch.float32)
    optimizer = SAM([p], rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    base = SGD([q], lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        for w, o in ((p, optimizer), (q, base)):
            w.grad = values((9,), step, torch.float32)
            o.step()
            o.state[w]["momentum_buffer"].mul_(0.5)
    torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_entries_that_the_user_adds_stay_in_the_state(backend: str) -> None:
    model, optimizer = trained(backend)
    p = next(model.parameters())
    optimizer.state[p]["note"] = 5
    optimizer.state["global"] = {"epoch": 3}  # type: ignore[index]
    two_steps(model, optimizer, 3)
    saved = optimizer.state_dict()
    assert saved["state"][0]["note"] == 5 and saved["state"]["global"] == {"epoch": 3}
    optimizer.load_state_dict(copy.deepcopy(saved))
    two_steps(model, optimizer, 4)
    assert optimizer.state[p]["note"] == 5


def test_options_of_groups_are_saved_and_loaded(backend: str) -> None:
    model = net()
    optimizer = SAM(groups_of(model, rho=0.3, adaptive=True, perturb=False), rho=0.1, backend=backend, **OPTIONS)
    saved = optimizer.state_dict()
    twin = net()
    other = SAM(groups_of(twin), rho=0.7, backend=backend, **OPTIONS)
    other.load_state_dict(saved)
    for group, same in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in same.items() if k != "params"}


def test_named_parameters_are_saved_by_name(backend: str) -> None:
    model = net()
    optimizer = SAM(model.named_parameters(), rho=0.1, backend=backend, **OPTIONS)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    other = SAM(net().parameters(), rho=0.1, backend=backend, **OPTIONS)
    other.load_state_dict(saved)


def test_saving_loading_and_copying_perturbed_weights_is_an_error(backend: str) -> None:
    model, optimizer = trained(backend)
    loss_of(model, 9).backward()
    optimizer.first_step()
    for call in (
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ):
        with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\).*restore\(\)"):
            call()
    optimizer.restore()
    optimizer.state_dict()


def test_loading_does_not_change_the_state_dict(backend: str) -> None:
    _, optimizer = trained(backend)
    saved = optimizer.state_dict()
    keys = [set(group) for group in saved["param_groups"]]
    for group in saved["param_groups"]:
        del group["rho"]
    other = SAM(net().parameters(), rho=0.1, backend=backend, **OPTIONS)
    other.load_state_dict(saved)
    assert [set(group) | {"rho"} for group in saved["param_groups"]] == keys
    assert "rho" not in saved["param_groups"][0]


def test_bf16_momentum_of_sgd_continues_in_fp32(backend: str) -> None:
    """torch.optim.SGD keeps bf16 momentum for bf16 weights. SAM converts it to fp32 without a change of value."""
    model = net(dtype=torch.bfloat16)
    base = SGD(model.parameters(), foreach=False, **OPTIONS)
    train_plain(model, base, range(2))
    buffers = [base.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    optimizer = SAM(twin.parameters(), rho=0.0, backend=backend, **{**OPTIONS, "momentum": 1.0, "weight_decay": 0.0})
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    optimizer.param_groups[0].update(momentum=1.0, weight_decay=0.0)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(twin.parameters(), buffers, strict=True):
        found = optimizer.state[p]["momentum_buffer"]
        assert found.dtype is torch.float32 and same_bits(found, b.float() + 0.0)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_checkpoints_may_lack_options_that_torch_added_later(cls: type[Optimizer]) -> None:
    model = net()
    state = cls(model.parameters(), lr=0.1).state_dict()
    for name in ("maximize", "foreach", "amsgrad", "fused", "decoupled_weight_decay"):
        state["param_groups"][0].pop(name, None)
    optimizer = SAM(model.parameters(), cls, lr=0.1)
    optimizer.load_state_dict(state)
    two_steps(model, optimizer, 0)
    assert optimizer.param_groups[0]["maximize"] is False


def test_adamw_stays_adamw_after_loading_adam() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    state = torch.optim.Adam([nn.Parameter(torch.ones(3))], **options).state_dict()
    ours, theirs = SAM([p], torch.optim.AdamW, rho=0.0, **options), torch.optim.AdamW([q], **options)
    for w, optimizer in ((p, ours), (q, theirs)):
        optimizer.load_state_dict(state)
        w.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("shape", [(6, 4), (2, 4)])
def test_state_of_another_shape_is_an_error(backend: str, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SAM([p], lr=0.1, momentum=0.9, backend=backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.first_step()
        optimizer.second_step()
    p.grad = None
    p.data = torch.zeros(shape)
    p.grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"'momentum_buffer' of shape \(4, 4\)"):
        optimizer.step()
