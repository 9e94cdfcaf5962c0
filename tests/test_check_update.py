"""check_update=False saves a pass and does not check the second gradients. All else is unchanged."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.backends import Variant
from torch import nn

from fused_sam import SAM


def pair(variant: Variant, check: bool) -> tuple[nn.Parameter, SAM]:
    p = nn.Parameter(torch.linspace(-1, 1, 1025))
    return p, SAM([p], rho=0.3, lr=0.1, momentum=0.9, weight_decay=0.01, backend=variant.name, check_update=check)


def step(p: nn.Parameter, optimizer: SAM, first: torch.Tensor, second: torch.Tensor) -> None:
    p.grad = first.clone()
    optimizer.first_step()
    p.grad = second.clone()
    optimizer.second_step()


def test_finite_steps_have_the_same_bits(variant: Variant) -> None:
    (p, trusting), (q, checking) = pair(variant, False), pair(variant, True)
    for k in range(3):
        torch.manual_seed(k)
        first, second = torch.randn(1025), torch.randn(1025)
        step(p, trusting, first, second)
        step(q, checking, first, second)
    assert torch.equal(p, q)
    assert math.isnan(trusting.update_norm)
    assert checking.update_norm > 0
    assert not trusting.skipped


def test_a_non_finite_first_gradient_still_changes_nothing(variant: Variant) -> None:
    p, optimizer = pair(variant, False)
    before = p.detach().clone()
    step(p, optimizer, torch.full((1025,), math.inf), torch.ones(1025))
    assert torch.equal(p, before)
    assert optimizer.skipped
    step(p, optimizer, torch.ones(1025), torch.ones(1025))
    assert not optimizer.skipped
    assert not torch.equal(p, before)


def test_a_non_finite_second_gradient_is_used_as_by_torch(variant: Variant) -> None:
    p, optimizer = pair(variant, False)
    second = torch.ones(1025)
    second[7] = math.nan
    step(p, optimizer, torch.ones(1025), second)
    assert p[7].isnan()
    assert p.isnan().sum() == 1


@pytest.mark.parametrize("check", [True, False])
def test_a_copy_keeps_the_option(check: bool) -> None:
    optimizer = SAM([nn.Parameter(torch.ones(3))], lr=0.1, check_update=check)
    p = copy.deepcopy(optimizer)
    weight = p.param_groups[0]["params"][0]
    step(weight, p, torch.ones(3), torch.ones(3))
    assert math.isnan(p.update_norm) != check
