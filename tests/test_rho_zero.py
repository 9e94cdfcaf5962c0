"""With rho = 0, `reference` equals torch.optim.SGD's for-loop bit for bit, and other backends within rounding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.backends import Variant
from support.bits import assert_same_bits, assert_same_optimizers
from support.draws import values, weights
from support.nets import closure_for, net
from torch import nn

from fused_sam import SAM

SHAPES = [(7,), (33, 3), (), (1025,), (0,)]
STEPS = 4

COMBINATIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": decay,
        "maximize": maximize,
        "lr": lr,
    }
    for momentum, dampening, nesterov, decay, maximize, lr in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.01), (False, True), (0.1, torch.tensor(0.1))
    )
    if not (nesterov and (momentum == 0 or dampening != 0)) and not (dampening and not momentum)
]


def both(dtype: torch.dtype, backend: str, options: dict[str, Any]) -> tuple[SAM, torch.optim.SGD]:
    ours, theirs = weights(SHAPES, dtype), weights(SHAPES, dtype)
    optimizer = SAM(ours, torch.optim.SGD, rho=0.0, backend=backend, **options)
    base = torch.optim.SGD(theirs, foreach=False, **options)
    for step in range(STEPS):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            for w in (p, q):
                w.grad = values(p.shape, 40 * step + i, dtype)
        optimizer.step()
        base.step()
    return optimizer, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_reference_is_sgd_bit_for_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_same_optimizers(*both(dtype, "reference", options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_backend_is_sgd_within_rounding(variant: Variant, dtype: torch.dtype) -> None:
    for options in COMBINATIONS:
        optimizer, base = both(dtype, variant.name, options)
        for group, other in zip(optimizer.param_groups, base.param_groups, strict=True):
            for p, q in zip(group["params"], other["params"], strict=True):
                # A fused multiply-add saves one rounding of each of 3 products per step. The terms are below 8.
                atol = STEPS * 3 * torch.finfo(dtype).eps * 8
                torch.testing.assert_close(p, q, rtol=0, atol=atol)
                assert optimizer.state[p].keys() == base.state[q].keys()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("off", [{"rho": 0.0}, {"rho": 0.5, "perturb": False}], ids=["rho", "perturb"])
def test_closure_runs_once(off: dict[str, Any], fresh: bool) -> None:
    """The update uses the closure's gradients even if others are present, as in torch.optim.SGD."""
    model, twin = net(), net()
    optimizer = SAM([{"params": list(model.parameters()), **off}], lr=0.1, momentum=0.9, backend="reference")
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        if fresh:
            closure_for(model, step)()
        runs: list[int] = []
        loss = optimizer.step(closure_for(model, step, runs))
        assert runs == [step]
        base.zero_grad()
        expected = base.step(closure_for(twin, step))
        assert torch.equal(loss, expected)
    assert_same_bits(model.parameters(), twin.parameters())


def test_two_steps_are_a_base_step(backend: str) -> None:
    """first_step() moves no weight, and second_step() is the base step with the second gradient."""
    p = nn.Parameter(torch.ones(5))
    optimizer = SAM([p], rho=0.0, lr=0.5, backend=backend)
    p.grad = torch.ones(5)
    optimizer.first_step(zero_grad=True)
    assert torch.equal(p, torch.ones(5)) and optimizer.perturbed
    p.grad = torch.full((5,), 2.0)
    optimizer.second_step()
    assert torch.equal(p, torch.zeros(5))


def test_groups_with_rho_zero_are_not_perturbed_with_other_groups(backend: str) -> None:
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = SAM([{"params": [p]}, {"params": [q], "rho": 0.0}], rho=1.0, lr=0.5, backend=backend)
    p.grad, q.grad = torch.ones(5), torch.ones(5)
    optimizer.first_step()
    assert torch.equal(q, torch.ones(5))
    # The group counts in the norm, unlike one with perturb=False. There are 10 ones in all.
    torch.testing.assert_close(p.detach(), torch.ones(5) + 10**-0.5)
