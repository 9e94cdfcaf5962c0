"""Sums of two vectors that are written to a third one, of another memory layout or dtype than its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_sam import SAM
from fused_sam.step import Step


class Swapped(SAM):
    """Writes a sum of two other vectors into the gradient, and the weights and the gradient into states."""

    keeps_ascent_grad = True

    def descent(self, step: Step) -> None:
        if step.perturbed:
            step.grad.copy_(2.0 * step.ascent_grad + 0.5 * step.weights)

    def updated(self, step: Step) -> None:
        step.state("first").copy_(step.grad)
        step.state("second").copy_(step.grad)


def gradients(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.randn(p.shape).to(p.dtype) for p in params]


def turned(g: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor whose last two dimensions are swapped in memory."""
    return g.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_of_a_sum_may_have_another_layout(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 7).to(dtype)), torch.nn.Parameter(torch.randn(3, 4, 6).to(dtype))]
    before = [p.detach().clone() for p in params]
    optimizer = Swapped(params, lr=1.0, rho=0.01, backend=backend)
    first, second = gradients(params), gradients(params)
    for p, g in zip(params, first, strict=True):
        p.grad = g.clone()
    optimizer.first_step()
    for p, g in zip(params, second, strict=True):
        p.grad = turned(g)
    seen: list[Any] = []
    step = optimizer.stepper.context
    original = Swapped.descent

    def descent(s: Step) -> None:
        seen.extend(w.clone() for w in s.weights._tensors if w is not None)
        original(optimizer, s)

    optimizer.descent = descent  # type: ignore[method-assign]
    optimizer.second_step()
    assert step is optimizer.stepper.context
    for p, w, at, g in zip(params, before, seen, first, strict=True):
        expected = w.double() - (2.0 * g.double() + 0.5 * at.double()).to(dtype).double()
        rtol = 0.02 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=1e-6)


def test_every_dtypes_state_is_written_where_there_are_several(backend: str) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(9).to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = Swapped(params, lr=0.0, rho=0.0, backend=backend)
    for _ in range(2):
        found = gradients(params)  # type: ignore[arg-type]
        for p, g in zip(params, found, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, g in zip(params, found, strict=True):
            for name in ("first", "second"):
                assert torch.equal(optimizer.state[p][name], g.float()), (name, p.dtype)
