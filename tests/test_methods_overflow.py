"""If only a method's combination of gradients overflows fp16, the step is skipped, with and without GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_sam

# First and second gradients, which are finite in fp16 (below 65504), and a method whose combination is not.
CASES: dict[str, tuple[type[Any], dict[str, Any], list[float], list[float]]] = {
    "WSAM coupled": (fused_sam.WSAM, {"decouple": False}, [1e4, -1e4], [2e4, -1e4]),
    "WSAM": (fused_sam.WSAM, {}, [-4e4, 1.0], [4e4, 1.0]),
    "GSAM": (fused_sam.GSAM, {"alpha": 1.0}, [-4e4, 6e4], [5e4, 4e4]),
}


def half(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float16)


def fp16_scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(1))
    return scaler


@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "alone"])
@pytest.mark.parametrize("masters", [True, False], ids=["masters", ""])
@pytest.mark.parametrize("case", CASES)
def test_an_overflow_of_the_combination_changes_nothing(backend: str, case: str, masters: bool, scaled: bool) -> None:
    method, options, first, second = CASES[case]
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = method([p], lr=1e-6, momentum=0.9, master_weights=masters, backend=backend, **options)
    scaler = fp16_scaler()
    p.grad = half(first)
    optimizer.first_step()
    p.grad = half(second)
    if scaled:
        scaler.step(optimizer)
    else:
        optimizer.second_step()
    assert optimizer.skipped
    assert torch.equal(p, torch.zeros_like(p)) and not optimizer.state[p].get("momentum_buffer", p).any()
    for gradient in ([1.0, 2.0], [2.0, 3.0]):  # the next step is not affected
        p.grad = half(gradient)
        if not optimizer.perturbed:
            optimizer.first_step()
    optimizer.second_step()
    assert not optimizer.skipped and p.isfinite().all() and p.any()


def test_looksam_skips_an_overflow_in_a_step_of_one_pass(backend: str) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = fused_sam.LookSAM([p], lr=1e-6, k=2, alpha=1.0, backend=backend)
    scaler = fp16_scaler()
    p.grad = half([1.0, 0.0])
    optimizer.first_step()
    p.grad = half([1.0, 1.0])
    scaler.step(optimizer)
    scaler.update()
    before = p.detach().clone()
    scaler.scale(torch.zeros(1))
    p.grad = half([0.0, 6e4])  # the kept direction is (0, 1), and is added with this gradient's norm
    assert not optimizer.needs_second_pass
    scaler.step(optimizer)
    assert optimizer.skipped and torch.equal(p, before)


def test_an_overflow_in_a_sum_that_the_scaler_does_not_check(backend: str) -> None:
    """The last micro-batch clears a gradient without a new one. The update uses the earlier sum; p.grad lacks it."""
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = fused_sam.MicrobatchSAM([p, q], lr=0.1, num_microbatches=2, backend=backend)
    scaler = fp16_scaler()
    for i, second in enumerate((torch.tensor([torch.inf, 1.0]), None)):
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        optimizer.first_step()
        p.grad, q.grad = second, torch.ones(2)
        if i == 0:
            optimizer.next_microbatch()
    scaler.step(optimizer)
    assert optimizer.skipped and not p.any() and not q.any()


def test_update_norm_is_that_of_the_combination_under_a_scaler(backend: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = fused_sam.WSAM([p], gamma=0.75, decouple=False, lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(1))
    p.grad = torch.tensor([8.0, 0.0])
    optimizer.first_step()
    p.grad = torch.tensor([8.0, 8.0])
    scaler.step(optimizer)
    assert float(optimizer.update_norm) == pytest.approx(10**0.5)  # -2 (1, 0) + 3 (1, 1) = (1, 3)
