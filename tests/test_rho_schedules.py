"""Tests of schedules of rho: warm-up, a rho proportional to the learning rate, and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_sam import SAM
from fused_sam.schedule import RhoProportionalToLR, RhoWarmup


def two_groups() -> SAM:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    return SAM([{"params": [a], "rho": 0.4}, {"params": [b]}], rho=0.2, lr=0.1)


def test_rho_warms_up() -> None:
    optimizer = two_groups()
    schedule = RhoWarmup(optimizer, 4, start=0.25)
    seen = []
    for _ in range(6):
        seen.append([group["rho"] for group in optimizer.param_groups])
        schedule.step()
    shares = [0.25, 0.4375, 0.625, 0.8125, 1.0, 1.0]
    assert seen == [[pytest.approx(0.4 * s), pytest.approx(0.2 * s)] for s in shares]
    other = two_groups()
    resumed = RhoWarmup(other, 4, start=0.25)
    half = RhoWarmup(optimizer := two_groups(), 4, start=0.25)
    half.step()
    resumed.load_state_dict(half.state_dict())
    assert [g["rho"] for g in other.param_groups] == [g["rho"] for g in optimizer.param_groups]


def test_a_group_added_later_warms_up_too() -> None:
    optimizer = two_groups()
    schedule = RhoWarmup(optimizer, 4, start=0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": 0.8})
    schedule.step()
    assert [g["rho"] for g in optimizer.param_groups] == [pytest.approx(0.625 * r) for r in (0.4, 0.2, 0.8)]


def test_a_warm_up_resumes_from_the_optimizer_alone() -> None:
    optimizer = two_groups()
    RhoWarmup(optimizer, 4)
    assert [g["rho"] for g in optimizer.param_groups] == [0, 0]
    other = two_groups()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = RhoWarmup(other, 2)
    for _ in range(2):
        schedule.step()
    assert [g["rho"] for g in other.param_groups] == [0.4, 0.2]


def test_a_warm_up_continues_after_another_optimizer_s_checkpoint() -> None:
    optimizer = two_groups()
    schedule = RhoWarmup(optimizer, 2)
    groups = [{"params": g["params"]} for g in optimizer.param_groups]
    optimizer.load_state_dict(torch.optim.SGD(groups, lr=0.1).state_dict())
    for _ in range(2):
        schedule.step()
    assert [g["rho"] for g in optimizer.param_groups] == [0.4, 0.2]


def test_a_warm_up_ignores_other_keys_of_a_state_dict() -> None:
    schedule = RhoWarmup(two_groups(), 4, start=0.5)
    schedule.step()
    one = SAM([nn.Parameter(torch.ones(1))], rho=0.3, lr=0.1)
    resumed = RhoWarmup(one, 9)
    resumed.load_state_dict({**copy.deepcopy(schedule.state_dict()), "optimizer": None, "unknown": 1})
    assert one.param_groups[0]["rho"] == pytest.approx(0.3 * 0.625)
    assert resumed.optimizer is one and not hasattr(resumed, "unknown")
    assert schedule.state_dict() == resumed.state_dict() == {"duration": 4, "start": 0.5, "steps": 1}


def test_rho_is_proportional_to_the_learning_rate() -> None:
    """arXiv 2203.08065."""
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = 0.05
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.01)
    schedule = RhoProportionalToLR(optimizer, 0.5, 0.1, lr_max=0.1, lr_min=0.01)
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.5)
    for _ in range(10):
        optimizer.step()
        rates.step()
        schedule.step()
        for group in optimizer.param_groups:
            assert group["rho"] == pytest.approx(0.1 + 0.4 * (group["lr"] - 0.01) / 0.09)
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.1)
    optimizer.param_groups[0]["lr"] = 0.001  # clamped to its range, so that rho stays in its range
    schedule.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: RhoWarmup(o, 0), "steps must be at least 1"),
        (lambda o: RhoWarmup(o, 3, start=2), "start must be from 0 to 1"),
        (lambda o: RhoProportionalToLR(o, -1, lr_max=1), "rho_max"),
        (lambda o: RhoProportionalToLR(o, 0.1, 0.2, lr_max=1), "rho_min"),
        (lambda o: RhoProportionalToLR(o, 0.1, lr_max=0.1, lr_min=0.1), "lr_max must be above lr_min"),
    ],
)
def test_rho_schedules_out_of_range(make: Callable[[SAM], Any], message: str) -> None:
    optimizer = two_groups()
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    assert [g["rho"] for g in optimizer.param_groups] == [0.4, 0.2]
