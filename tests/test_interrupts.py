"""An exception at any moment of a step leaves clean weights and the state that belongs to them, or restore() does.

A step of every method is ended before one of its bytecodes, as an interrupt or a signal handler that raises would, and
steps of SAM by signals at random moments. FUSED_SAM_EVERY_BYTECODE=1 tries all bytecodes. `make campaign` has other
bytecodes on each run, and more signals.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import interrupts, nets
from support.campaign import Campaign
from support.family import METHODS, built, clean, model_and_groups, resume, train
from torch import nn

from fused_sam import SAM, MomentumSAM

PLACES = 16


def held(optimizer: Any) -> Any:
    """Return copies of the clean weights and of the state."""
    clean(optimizer)
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    state = [
        {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return weights, state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def places(campaign: Campaign, count: int, seed: str) -> list[int]:
    """Return the bytecodes to raise at: some from each part of the step, or all."""
    found = list(range(count))
    if not os.environ.get("FUSED_SAM_EVERY_BYTECODE"):
        draw = random.Random(f"{campaign.seed} {seed}" if campaign.long else seed)
        width = count / PLACES
        found = [int(k * width + draw.random() * width) for k in range(PLACES)]
    campaign.count(cases=1, faults=len(found))
    return found


def train_by_closure(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        run = nets.closure_for(model, step)

        def closure(run: nets.Closure = run) -> torch.Tensor:
            optimizer.zero_grad()
            return run()

        optimizer.step(closure)


@pytest.mark.parametrize("loop", [train, train_by_closure], ids=["hand loop", "closure"])
@pytest.mark.parametrize("steps", [0, 1], ids=["first step", "second step"])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_at_any_bytecode_of_a_step_loses_nothing(
    campaign: Campaign, backend: str, method: str, steps: int, loop: Callable[[nn.Module, Any, range], None]
) -> None:
    def trained() -> tuple[nn.Module, Any]:
        model, optimizer = built(method, backend)
        loop(model, optimizer, range(steps))
        return model, optimizer

    step = range(steps, steps + 1)
    old = held(trained()[1])
    model, optimizer = trained()
    count = interrupts.run(partial(loop, model, optimizer, step))
    new = held(optimizer)
    assert not same(old[0], new[0])
    lost = []
    for at in places(campaign, count, f"{method} {backend} {steps} {loop.__name__}"):
        model, optimizer = trained()
        interrupts.run(partial(loop, model, optimizer, step), at)
        where = f"bytecode {at} of {count}: {interrupts.run.place}"
        if optimizer.perturbed:
            optimizer.restore()
        now = held(optimizer)
        if same(now, new):
            continue
        if not same(now[0], old[0]) and not same(now[0], new[0]):
            lost.append(f"weights lost, {where}")
        elif not same(now[1], (new if same(now[0], new[0]) else old)[1]):
            lost.append(f"state of another step than the weights, {where}")
        else:
            resume(optimizer)
            loop(model, optimizer, step)
            if not method.startswith("ESAM") and not same(held(optimizer), new):  # which draws other elements then
                lost.append(f"the step again gives other weights, {where}")
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("method", ["ASAM", "FriendlySAM", "MomentumSAM", "MicrobatchSAM"])
def test_a_second_interrupt_while_an_update_is_completed_loses_nothing(
    campaign: Campaign, backend: str, method: str
) -> None:
    def trained() -> tuple[nn.Module, Any]:
        model, optimizer = built(method, backend)
        train(model, optimizer, range(1))
        optimizer.zero_grad()
        nets.loss_of(model, 1).backward()
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            nets.loss_of(model, 1).backward()
        return model, optimizer

    _, optimizer = trained()
    before, optimizer = held_after_restore(optimizer), trained()[1]
    count = interrupts.run(optimizer.step)
    new = held(optimizer)
    draw = random.Random(f"{method} {backend}")
    for at in places(campaign, count, f"twice {method} {backend}"):
        _, optimizer = trained()
        again = draw.randint(1, 60)
        interrupts.run(optimizer.step, at, again)
        where = f"bytecodes {at} and {again} after, of {count}: {interrupts.run.place}"
        if optimizer.perturbed or isinstance(optimizer, MomentumSAM):
            optimizer.restore()
        now = held(optimizer)
        assert same(now, new) or same(now, before), where


def held_after_restore(optimizer: Any) -> Any:
    optimizer.restore()
    return held(optimizer)


def test_an_update_that_interrupts_keep_incomplete_is_completed_by_the_next_call(backend: str) -> None:
    model, optimizer = built("FriendlySAM", backend)
    train(model, optimizer, range(1))
    twin_model, twin = copy.deepcopy((model, optimizer))
    for each, other in ((model, optimizer), (twin_model, twin)):
        other.zero_grad()
        nets.loss_of(each, 1).backward()
        other.first_step(zero_grad=True)
        nets.loss_of(each, 1).backward()
    twin.step()

    def interrupt() -> None:
        raise interrupts.Interrupt

    optimizer.stepper.context._run_updated = interrupt  # however often it is tried
    with pytest.raises(interrupts.Interrupt):
        optimizer.step()
    del optimizer.stepper.context._run_updated
    assert optimizer.perturbed
    optimizer.zero_grad(set_to_none=False)  # the next call
    assert not optimizer.perturbed
    assert same(held(optimizer), held(twin))


def test_an_exception_at_any_bytecode_of_unperturbed_loses_nothing(campaign: Campaign, backend: str) -> None:
    def first_half() -> tuple[nn.Module, Any]:
        model, optimizer = built("ASAM", backend)
        train(model, optimizer, range(1))
        optimizer.zero_grad()
        nets.loss_of(model, 1).backward()
        return model, optimizer

    def suspend(optimizer: Any) -> None:
        optimizer.first_step()
        with optimizer.unperturbed():
            pass

    old = held(first_half()[1])
    count = interrupts.run(partial(suspend, first_half()[1]))
    for at in places(campaign, count, backend):
        model, optimizer = first_half()
        interrupts.run(partial(suspend, optimizer), at)
        optimizer.restore()
        assert not optimizer.perturbed
        assert same(held(optimizer), old), f"bytecode {at} of {count}: {interrupts.run.place}"
        train(model, optimizer, range(1, 2))


def test_an_exception_at_any_bytecode_of_a_load_leaves_the_old_state_or_the_new(
    campaign: Campaign, backend: str
) -> None:
    saved = built("ASAM", backend)
    train(*saved, range(3))
    state = saved[1].state_dict()

    def trained() -> tuple[nn.Module, Any]:
        model, optimizer = built("ASAM", backend)
        train(model, optimizer, range(1))
        return model, optimizer

    def after_a_step(model: nn.Module, optimizer: Any) -> Any:
        train(model, optimizer, range(4, 5))
        return held(optimizer)

    model, optimizer = trained()
    count = interrupts.run(partial(optimizer.load_state_dict, state))
    new, old = after_a_step(model, optimizer), after_a_step(*trained())
    assert not same(new, old)
    for at in places(campaign, count, backend):
        model, optimizer = trained()
        interrupts.run(partial(optimizer.load_state_dict, state), at)
        now = after_a_step(model, optimizer)
        assert same(now, old) or same(now, new), f"bytecode {at} of {count}: {interrupts.run.place}"


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_signals_at_random_moments_lose_nothing(campaign: Campaign, backend: str, base: str) -> None:
    model, groups = model_and_groups(torch.float32)
    for group in groups:
        group.pop("nesterov", None)
        if base == "AdamW":
            group.pop("momentum", None)
    options = {"momentum": 0.9} if base == "SGD" else {}
    optimizer = SAM(groups, getattr(torch.optim, base), backend=backend, lr=0.1, rho=0.1, **options)
    train(model, optimizer, range(3))
    begin = time.perf_counter()
    train(model, optimizer, range(3, 8))
    duration = (time.perf_counter() - begin) / 5
    draw = random.Random(f"{campaign.seed} {backend} {base}")

    def interrupt(*_: object) -> None:
        raise interrupts.Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    ended = 0
    try:
        for step in range(campaign.number(50, 300)):
            weights, state = held(optimizer)
            twin_model, twin = copy.deepcopy((model, optimizer))
            train(twin_model, twin, range(step, step + 1))
            new = held(twin)
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * draw.uniform(0.02, 1.1))
                train(model, optimizer, range(step, step + 1))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except interrupts.Interrupt:
                ended += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)  # the signal may come while torch itself has it off
            if optimizer.perturbed:
                optimizer.restore()
            now = held(optimizer)
            assert same(now, new) or same(now, (weights, state)), f"step {step}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    campaign.count(cases=1, faults=ended)
    assert ended > 10
