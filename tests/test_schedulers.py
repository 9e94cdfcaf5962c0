"""Learning-rate schedulers act on SAM as on torch.optim.SGD, without a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import assert_same_bits
from support.nets import closure_for, groups_of, net, train, train_plain, two_steps
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from fused_sam import SAM

STEPS = 12

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: schedulers.StepLR(o, step_size=3, gamma=0.5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=STEPS),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.2, total_steps=STEPS),
    "warm-up": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "lambda": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.5**t]),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_with_rho_zero_sam_is_sgd_bit_for_bit(schedule: Callable[[Optimizer], Any]) -> None:
    model, twin = net(), net()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = SAM(groups_of(model, lr=0.02), rho=0.0, backend="reference", **options)  # type: ignore[arg-type]
    base = torch.optim.SGD(groups_of(twin, lr=0.02), foreach=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter")  # SequentialLR in older torch warns of its own call
        ours = schedule(optimizer)
        for step in range(STEPS - 1):
            optimizer.step(closure_for(model, step))
            ours.step()
    theirs = schedule(base)
    for step in range(STEPS - 1):
        train_plain(twin, base, range(step, step + 1))
        theirs.step()
    assert_same_bits(model.parameters(), twin.parameters())
    for group, other in zip(optimizer.param_groups, base.param_groups, strict=True):
        assert (group["lr"], group["momentum"]) == (other["lr"], other["momentum"])


def test_one_cycle_changes_momentum_on_every_backend(backend: str) -> None:
    model, twin = net(), net()
    optimizers = [
        SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend),
        SAM(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend="reference"),
    ]
    both = [schedulers.OneCycleLR(o, max_lr=0.2, total_steps=STEPS) for o in optimizers]
    seen = set()
    for step in range(STEPS - 1):
        two_steps(model, optimizers[0], step)
        two_steps(twin, optimizers[1], step)
        for scheduler in both:
            scheduler.step()
        seen.add(optimizers[0].param_groups[0]["momentum"])
    assert len(seen) > 4
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_tensor_lr_is_scheduled_in_place(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=torch.tensor(0.1), momentum=0.9, backend=backend)
    other = SAM(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    both = [schedulers.StepLR(o, step_size=1, gamma=0.5) for o in (optimizer, other)]
    for step in range(4):
        two_steps(model, optimizer, step)
        two_steps(twin, other, step)
        for scheduler in both:
            scheduler.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_reduce_on_plateau_and_a_resumed_scheduler(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025
    scheduler = schedulers.StepLR(optimizer, step_size=1, gamma=0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    other = SAM(net().parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    resumed = schedulers.StepLR(other, step_size=1, gamma=0.5)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.0125
    assert other.param_groups[0]["initial_lr"] == 0.025


def test_an_averaged_model_of_the_same_weights(backend: str) -> None:
    """torch.optim.swa_utils updates its own copies from the optimizer's weights."""
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, backend=backend)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    seen = []
    for step in range(3):
        two_steps(model, optimizer, step)
        swa.step()
        averaged.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for i, p in enumerate(averaged.module.parameters()):
        torch.testing.assert_close(p.detach(), sum(s[i] for s in seen) / 3)
