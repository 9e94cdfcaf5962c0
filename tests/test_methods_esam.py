"""Tests of ESAM: the samples, elements and tensors that it selects, and the gradients that it saves."""

from __future__ import annotations

import pytest
import torch
from support import nets
from support.bits import Snapshot
from torch import Tensor, nn

import fused_sam
from fused_sam.training import sam_step


def test_esam_selects_samples_only_in_sam_step(backend: str) -> None:
    model = nets.net()
    optimizer = fused_sam.ESAM(model.parameters(), lr=0.1, backend=backend)
    assert optimizer.selected_fraction == 0.5
    assert fused_sam.ESAM(model.parameters(), gamma=1.0).selected_fraction is None
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sam_step .* or gamma=1"):
        optimizer.step(nets.closure_for(model, 0))
    before.assert_unchanged()
    sizes = []

    def losses(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append(len(data[0]))
        return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")

    sam_step(model, losses, nets.batch(0), optimizer)
    assert sizes == [32, 32, 16]  # round(0.5 * 32)
    with pytest.raises(ValueError, match="one loss per sample"):
        sam_step(model, lambda m, d: losses(m, d).mean(), nets.batch(0), optimizer)


def test_esam_perturbs_a_share_of_the_elements_by_rho_over_beta(backend: str) -> None:
    p = nn.Parameter(torch.zeros(10_000))
    optimizer = fused_sam.ESAM([p], rho=1.0, beta=0.25, gamma=1.0, lr=0.1, backend=backend)
    p.grad = torch.ones(10_000)
    optimizer.first_step()
    moved = p.detach() != 0
    assert 0.23 < float(moved.float().mean()) < 0.27  # 4.6 standard deviations
    torch.testing.assert_close(p.detach()[moved], torch.full((int(moved.sum()),), 1 / 0.25 / 100))
    optimizer.second_step()
    clean = p.detach().clone()
    optimizer.first_step()
    assert not torch.equal(p.detach() != clean, moved)  # each step draws a new mask


def test_esam_tensors_saves_gradients_in_a_closure(backend: str) -> None:
    model = nets.net()
    params = list(model.parameters())
    optimizer = fused_sam.ESAM(params, beta=0.5, gamma=1.0, mask="tensors", lr=0.1, backend=backend)
    computed: list[int] = []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: computed.append(id(p)))
    counts = []
    for step in range(6):
        computed.clear()
        optimizer.step(nets.closure_for(model, step))
        counts.append(len(computed))
    assert all(len(params) < n <= 2 * len(params) for n in counts) and min(counts) < 2 * len(params)


def test_esam_tensors_restores_requires_grad(backend: str) -> None:
    model = nets.net()
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = fused_sam.ESAM(model.parameters(), beta=0.1, gamma=1.0, mask="tensors", lr=0.1, backend=backend)
    nets.two_steps(model, optimizer, 0)  # the first step computes all gradients
    try:
        with optimizer.first_pass():
            assert 1 <= sum(p.requires_grad for p in model.parameters()) < 5
            raise KeyError
    except KeyError:
        pass
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
