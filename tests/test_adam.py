"""Tests of the fused Adam and AdamW: they have torch's results, state and checkpoints."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.draws import LAYOUTS, ODD_SHAPES, doubled, draw_passes, set_gradients, take_steps, values, weights
from support.nets import loss_of, net, train, two_steps
from torch import nn

from fused_sam import SAM
from fused_sam.backends.contract import ADAM

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "AdamW amsgrad maximize": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.0, 0.5)}),
    "Adam, decoupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def by_hand(base: torch.optim.Optimizer, params: list[nn.Parameter], rho: float, both: tuple[Any, Any]) -> None:
    """Return weights and state of torch's own for-loop. Given gradients do not depend on the perturbation."""
    set_gradients(params, both[1])
    base.step()


@pytest.mark.parametrize(("cls", "options"), OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_equals_torchs_for_loop(backend: str, dtype: torch.dtype, cls: Any, options: dict[str, Any]) -> None:
    if missing := options.keys() - inspect.signature(cls).parameters.keys():
        pytest.skip(f"this torch's {cls.__name__} has no {', '.join(missing)}")
    params = weights(ODD_SHAPES, dtype)
    twin = doubled(params)
    half = len(params) // 2
    split = {"lr": 0.003, "weight_decay": 0.02}
    optimizer = SAM([{"params": params[:half]}, {"params": params[half:], **split}], cls, rho=0.1, backend=backend,
                    **options)  # fmt: skip
    base = cls([{"params": twin[:half]}, {"params": twin[half:], **split}], foreach=False, **options)
    assert optimizer.stepper.base.rule is ADAM
    for both in draw_passes(params, 6):
        take_steps(optimizer, params, [both])
        by_hand(base, twin, 0.1, ([], [g.double() for g in both[1]]))
    for p, q in zip(params, twin, strict=True):
        # In fp32, root, quotient and bias correction of a step each err by 2^-23. Six steps near 1 add up.
        tight = dtype is torch.float64
        torch.testing.assert_close(p.double(), q, rtol=1e-12 if tight else 2e-6, atol=1e-12 if tight else 2e-6)
        mine, theirs = optimizer.state[p], base.state[q]
        assert mine.keys() == theirs.keys()
        for name in mine:
            # Sums of numbers near 1.
            torch.testing.assert_close(mine[name].double(), theirs[name].double(), rtol=1e-5, atol=1e-6)
        assert mine["step"].dtype is torch.float32 and mine["step"] == 6


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_checkpoints_go_both_ways(backend: str, direction: str) -> None:
    model, twin = net(), net()
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}
    ours = SAM(model.parameters(), torch.optim.AdamW, rho=0.0, backend=backend, **options)
    theirs = torch.optim.AdamW(twin.parameters(), foreach=False, **options)
    for step in range(3):
        for m, o in ((model, ours), (twin, theirs)):
            o.zero_grad()
            loss_of(m, step).backward()
            o.step()
    fresh = net(seed=3)
    other: Any
    if direction == "to torch":
        other = torch.optim.AdamW(fresh.parameters(), foreach=False, **options)
        other.load_state_dict(copy.deepcopy(ours.state_dict()))
        fresh.load_state_dict(model.state_dict())
    else:
        other = SAM(fresh.parameters(), torch.optim.AdamW, rho=0.0, backend=backend, **options)
        other.load_state_dict(copy.deepcopy(theirs.state_dict()))
        fresh.load_state_dict(twin.state_dict())
    for step in range(3, 6):
        for m, o in ((model, ours), (twin, theirs), (fresh, other)):
            o.zero_grad()
            loss_of(m, step).backward()
            o.step()
    for p, q in zip(fresh.parameters(), (twin if direction == "to torch" else model).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # six fp32 steps of 0.01 with recomputed gradients


@pytest.mark.parametrize("half", [0, 1])
def test_a_skipped_first_step_leaves_no_state(backend: str, half: int) -> None:
    params = weights([(33,), (7, 3), (0,)], torch.float32)
    optimizer = SAM(params, torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    before = Snapshot(optimizer)
    both = draw_passes(params, 1)[0]
    both[half][0][5] = float("nan")
    take_steps(optimizer, params, [both])
    assert optimizer.skipped
    before.assert_unchanged()
    take_steps(optimizer, params, draw_passes(params, 1))
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 1, 1]


def test_a_skipped_later_step_is_not_counted(backend: str) -> None:
    params = weights([(33,), (7, 3), (0,)], torch.float32)
    optimizer = SAM(params, torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    take_steps(optimizer, params, draw_passes(params, 2))
    before = Snapshot(optimizer)
    both = draw_passes(params, 1)[0]
    both[1][0][5] = float("inf")
    take_steps(optimizer, params, [both])
    before.assert_unchanged()


def test_each_weight_counts_its_own_steps(backend: str) -> None:
    params, twin = weights([(33,), (7, 3)], torch.float64), weights([(33,), (7, 3)], torch.float64)
    optimizer = SAM(params, torch.optim.AdamW, rho=0.0, lr=0.01, backend=backend)
    base = torch.optim.AdamW(twin, lr=0.01, foreach=False)
    for step in range(4):
        for group, o in ((params, optimizer), (twin, base)):
            set_gradients(group, [values((33,), step), values((7, 3), step) if step >= 2 else None])
            o.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(backend: str, layout: str) -> None:
    x = values((4, 6, 3, 5), 1, torch.float32)
    p, q = nn.Parameter(LAYOUTS[layout](x)), nn.Parameter(x.double())
    optimizer = SAM([p], torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    base = torch.optim.AdamW([q], lr=0.01, foreach=False)
    for both in draw_passes([p], 3):
        take_steps(optimizer, [p], [both])
        set_gradients([q], [both[1][0].double()])
        base.step()
    torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-6, atol=2e-6)  # three fp32 steps near 1


def test_learning_rate_as_a_tensor(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=torch.tensor(0.01), backend=backend)
    other = SAM(twin.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    for step in range(2):
        two_steps(model, optimizer, step)
        two_steps(twin, other, step)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    other.param_groups[0]["lr"] = 0.005
    two_steps(model, optimizer, 2)
    two_steps(twin, other, 2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # 0.01 is rounded to fp32


def test_state_entries_that_the_user_replaced_are_used(backend: str) -> None:
    """The optimizer reads entries again if a user has replaced them."""
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    train(model, optimizer, range(2))
    p = next(model.parameters())
    optimizer.state[p]["exp_avg"] = torch.full_like(p, 5.0)
    optimizer.state[p]["step"] = 7  # old checkpoints have such steps
    before = p.detach().clone()
    two_steps(model, optimizer, 2)
    assert optimizer.state[p]["step"] == 8
    assert float((p.detach() - before).abs().min()) > 0.005, "5.0 in the first moment moves every weight"


def test_deep_copies_share_nothing(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, range(2, 4))
    kept = [float(optimizer.state[p]["step"]) for p in model.parameters()]
    assert kept == [2.0] * len(kept)
    train(model, optimizer, range(2, 4))
    assert_same_bits(model.parameters(), twin.parameters())


