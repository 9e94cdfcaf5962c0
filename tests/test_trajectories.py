"""Twenty training steps equal two oracles: SAM written out in float64, and the public package pytorch_optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from support.backends import Variant
from support.nets import batch, closure_for, groups_of, loss_of, net, two_steps
from support.oracle import HandwrittenSAM

from fused_sam import SAM

STEPS = 20

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampened": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-2},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "maximize": {"lr": 1e-3, "momentum": 0.5, "maximize": True},
    "adaptive": {"lr": 0.1, "momentum": 0.9, "adaptive": True, "rho": 1.0},
    "eta": {"lr": 0.1, "momentum": 0.9, "adaptive": True, "eta": 0.01, "rho": 0.5},
}
OF_BIASES: dict[str, Any] = {"lr": 0.02, "rho": 0.2, "momentum": 0.3, "dampening": 0.0, "nesterov": False}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_trajectory_of_sam_written_by_hand(variant: Variant, options: dict[str, Any]) -> None:
    """All is float64. 20 steps differ only by rounding, 1e-16 per step, which training amplifies to less than 1e-11."""
    ours, hand = net(dtype=torch.float64), net(dtype=torch.float64)
    options = {"rho": 0.05, **options}
    groups = [{**options, **group} for group in groups_of(hand, **OF_BIASES)]
    oracle = HandwrittenSAM(groups)
    optimizer = SAM(groups_of(ours, **OF_BIASES), torch.optim.SGD, backend=variant.name, **options)
    for step in range(STEPS):
        two_steps(ours, optimizer, step)
        for half in (oracle.perturb, oracle.update):
            hand.zero_grad()
            loss_of(hand, step).backward()
            half()
    for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("several_groups", [False, True])
def test_trajectory_of_pytorch_optimizer(variant: Variant, adaptive: bool, several_groups: bool) -> None:
    """fp32 has two roundings of 6e-8 per step, which 20 steps amplify. 2e-5 is a thousandth of one step's change."""
    ours, theirs = net(), net()
    # pytorch_optimizer has a per-group rho, but no per-group perturb or eta.
    of_biases = {"lr": 0.02, "rho": 0.2, "momentum": 0.3} if several_groups else {}
    options: dict[str, Any] = {"rho": 0.1, "adaptive": adaptive, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = SAM(groups_of(ours, **of_biases), torch.optim.SGD, backend=variant.name, **options)
    oracle = pytorch_optimizer.SAM(groups_of(theirs, **of_biases), torch.optim.SGD, **options)
    for step in range(STEPS):
        two_steps(ours, optimizer, step)
        closure = closure_for(theirs, step)
        closure()
        oracle.step(closure)
        oracle.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-5)


def test_every_order_of_calls_gives_the_same_weights(backend: str) -> None:
    """Two steps, both conventions of closures, and step() as second_step() agree bit for bit."""
    models = [net() for _ in range(4)]
    optimizers = [SAM(m.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend) for m in models]
    for step in range(5):
        two_steps(models[0], optimizers[0], step)

        closure_for(models[1], step)()  # the public SAM package's convention
        optimizers[1].step(closure_for(models[1], step))
        optimizers[1].zero_grad()

        optimizers[2].step(closure_for(models[2], step))  # torch's own convention

        loss_of(models[3], step).backward()
        optimizers[3].first_step()
        optimizers[3].zero_grad(set_to_none=False)
        loss_of(models[3], step).backward()
        optimizers[3].step()
        optimizers[3].zero_grad(set_to_none=False)
    for other in models[1:]:
        for p, q in zip(models[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_gradient_accumulation_equals_the_whole_batch(backend: str) -> None:
    """Two micro-batches per pass with halved losses equal one batch. float64 hides the order of sums."""
    whole, parts = net(dtype=torch.float64), net(dtype=torch.float64)
    one = SAM(whole.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    other = SAM(parts.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for step in range(5):
        two_steps(whole, one, step)
        x, y = batch(step, torch.float64)
        for half in (other.first_step, other.second_step):
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                (torch.nn.functional.cross_entropy(parts(a), b) / 2).backward()
            half(zero_grad=True)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
