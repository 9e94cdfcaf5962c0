"""Tests of schedules: the steps that perturb, and resuming from a state_dict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_optimizers
from support.family import train
from torch import nn

import fused_sam
from fused_sam import SAM, LookSAM
from fused_sam.schedule import AdaptiveSchedule, AfterDecay, Every, LastSteps, Random, Schedule

STEPS = 20


def perturbed_steps(schedule: Schedule | None, backend: str, steps: int = STEPS, **options: Any) -> list[bool]:
    model = nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, schedule=schedule, backend=backend, **options)
    seen = []
    for step in range(steps):
        passes: list[int] = []
        optimizer.zero_grad()
        optimizer.step(nets.closure_for(model, step, passes))
        seen.append(len(passes) == 2)
    return seen


def test_every(backend: str) -> None:
    assert perturbed_steps(Every(3), backend) == [t % 3 == 0 for t in range(STEPS)]
    assert perturbed_steps(Every(1), backend) == [True] * STEPS


@pytest.mark.parametrize(
    ("start", "total", "first"), [(0.7, 20, 14), (0.71, 20, 15), (13, None, 13), (0.0, 20, 0), (1.0, 20, 20)]
)
def test_last_steps(backend: str, start: float, total: int | None, first: int) -> None:
    assert perturbed_steps(LastSteps(start, total), backend) == [t >= first for t in range(STEPS)]


@pytest.mark.parametrize(("share", "total", "first"), [(0.07, 100, 7), (0.55, 100, 55), (0.14, 50, 7), (0.141, 50, 8)])
def test_last_steps_of_a_share_that_is_a_whole_number_of_steps(share: float, total: int, first: int) -> None:
    assert LastSteps(share, total).start == first


def test_after_decay_waits_for_a_rate_above_zero(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.0, schedule=AfterDecay(0.5), backend=backend)
    seen = []
    for rate in (0.0, 0.0, 0.01, 0.1, 0.1, 0.04):
        optimizer.param_groups[0]["lr"] = rate
        nets.loss_of(model, 0).backward()
        seen.append(optimizer.needs_second_pass)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [False] * 5 + [True]


def test_after_decay_works_with_any_scheduler(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, schedule=AfterDecay(0.3), backend=backend)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
        ],
        milestones=[3],
    )
    seen, rates = [], []
    for step in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        nets.loss_of(model, step).backward()
        seen.append(optimizer.needs_second_pass)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(0.1)  # a warm-up is not a decay
    assert seen == [t > 3 and rate <= 0.03 for t, rate in enumerate(rates)]
    assert any(seen)


def test_random_is_reproducible_and_has_its_probability(backend: str) -> None:
    first = perturbed_steps(Random(0.3, seed=1), backend)
    assert first == perturbed_steps(Random(0.3, seed=1), backend) and first != perturbed_steps(
        Random(0.3, seed=2), backend
    )

    optimizer = SAM([nn.Parameter(torch.ones(1))], schedule=Random(0.3, seed=9))
    due = []
    for t in range(4000):
        optimizer.param_groups[0]["sam_step"] = t
        optimizer.restore()
        due.append(optimizer.needs_second_pass)
    assert abs(sum(due) / 4000 - 0.3) < 0.03  # 4 standard deviations
    assert not any(perturbed_steps(Random(0.0), backend)) and all(perturbed_steps(Random(1.0), backend))


def adaptive_rule(squares: list[float], total: int, low: float, high: float, delta: float) -> list[bool]:
    """Return the decisions of arXiv 2304.14647, written out."""
    mean = variance = 0.0
    due = []
    for t, s in enumerate(squares):
        mean = delta * mean + (1 - delta) * s
        variance = delta * variance + (1 - delta) * (s - mean) ** 2
        c = min(1, t / total) * low + (1 - min(1, t / total)) * high
        due.append(s >= mean + c * math.sqrt(variance))
    return due


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_adaptive(backend: str, scale: float | None) -> None:
    model = nets.net()
    optimizer = SAM(
        model.parameters(), rho=0.1, lr=0.1, schedule=AdaptiveSchedule(15, -0.5, 0.8, delta=0.7), backend=backend
    )
    assert optimizer.needs_grad_scale
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=3, enabled=scale is not None)
    squares, seen = [], []
    for step in range(STEPS):
        optimizer.ascent_grad_scale = scaler.get_scale()
        scaler.scale(nets.loss_of(model, step)).backward()
        g = [p.grad.double() / scaler.get_scale() for p in model.parameters() if p.grad is not None]
        squares.append(sum(float(x.square().sum()) for x in g))
        seen.append(optimizer.needs_second_pass)
        if seen[-1]:
            optimizer.first_step(zero_grad=True)
            scaler.scale(nets.loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert seen == adaptive_rule(squares, 15, -0.5, 0.8, 0.7)
    assert 3 < sum(seen) < STEPS - 3


def test_adaptive_with_a_closure_and_gradients_computed_before(backend: str) -> None:
    runs = []
    for before in (False, True):
        model = nets.net()
        optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, schedule=AdaptiveSchedule(10), backend=backend)
        for step in range(8):
            optimizer.zero_grad()
            closure = nets.closure_for(model, step)
            if before:
                closure()
            optimizer.step(closure)
        runs.append(optimizer)
    assert_same_optimizers(*runs)
    assert runs[0].param_groups[0]["square_mean"] == runs[1].param_groups[0]["square_mean"]


def test_reading_needs_second_pass_before_the_gradients_is_an_error(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, schedule=AdaptiveSchedule(10), backend=backend)
    with pytest.raises(RuntimeError, match=r"ask after backward\(\)"):
        _ = optimizer.needs_second_pass
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["sam_step"] == 2


def test_adaptive_leaves_non_finite_gradients_out_of_its_averages(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, schedule=AdaptiveSchedule(10), backend=backend)
    train(model, optimizer, range(3))
    before = dict(optimizer.param_groups[0])
    optimizer.zero_grad()
    nets.loss_of(model, 3).backward()
    next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    assert optimizer.needs_second_pass
    optimizer.first_step()
    optimizer.step()
    after = optimizer.param_groups[0]
    assert optimizer.skipped and after["sam_step"] == 4
    assert all(after[k] == before[k] for k in ("square_mean", "square_variance"))


@pytest.mark.parametrize(
    "schedule",
    [Every(3), LastSteps(0.5, 8), AfterDecay(), Random(0.5), AdaptiveSchedule(12)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("cls", [SAM, LookSAM])
def test_a_state_dict_resumes_the_schedule(backend: str, schedule: Schedule, cls: type[SAM]) -> None:
    def new() -> tuple[nn.Module, SAM]:
        model = nets.net()
        return model, cls(
            model.parameters(), rho=0.1, lr=0.1, momentum=0.9, schedule=copy.deepcopy(schedule), backend=backend
        )

    model, optimizer = new()
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["lr"] = 0.04
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(5, 12))
    other, resumed = new()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(5, 12))
    assert_same_optimizers(optimizer, resumed)
    for a, b in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Every(0), ValueError, "interval must be at least 1"),
        (lambda: Every(1.5), TypeError, "interval must be a whole number"),
        (lambda: LastSteps(0.7), ValueError, r"LastSteps\(0.7, total\)"),
        (lambda: LastSteps(1.5, 10), ValueError, "start must be from 0 to 1"),
        (lambda: LastSteps(-1), ValueError, "start must be at least 0"),
        (lambda: LastSteps(0.5, 0), ValueError, "total must be at least 1"),
        (lambda: AfterDecay(1.0), ValueError, "fraction must be below 1"),
        (lambda: Random(1.1), ValueError, "probability must be from 0 to 1"),
        (lambda: Random(0.5, -1), ValueError, "seed must be at least 0"),
        (lambda: AdaptiveSchedule(0), ValueError, "total must be at least 1"),
        (lambda: AdaptiveSchedule(10, delta=1), ValueError, "delta must be below 1"),
        (lambda: AdaptiveSchedule(10, lambda_1=math.nan), ValueError, "lambda_1"),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("method", ["ESAM", "GCSAM", "SAM"])
def test_a_schedule_that_needs_the_scale_gets_it_with_every_method(method: str) -> None:
    """Also where the method itself does not need it."""
    p = nn.Parameter(torch.ones(2))
    own = {"gamma": 1.0} if method == "ESAM" else {}
    make = getattr(fused_sam, method)
    assert make([p], lr=0.1, schedule=AdaptiveSchedule(5), **own).needs_grad_scale
    assert not make([p], lr=0.1, **own).needs_grad_scale
