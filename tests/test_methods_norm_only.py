"""Tests of norm_only_groups, with which SAM perturbs only the norm layers."""

from __future__ import annotations

import pytest
import torch
from support import nets
from torch import nn

import fused_sam


def test_norm_only_groups_finds_every_norm_layer_once() -> None:
    class MyRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.mixing = nn.Parameter(torch.ones(4, 4))  # a parameter that is neither a scale nor a shift

    class Normalizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    shared = nn.LayerNorm(4)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4)]
    model = nn.ModuleList(
        [*layers, MyRMSNorm(), Normalizer(), shared, shared, nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False)]
    )
    groups = fused_sam.norm_only_groups(model, rho=0.7, weight_decay=0.0)
    norms, others = (list(map(id, g["params"])) for g in groups)
    expected = [p for m in (*layers[1:], model[5], shared, model[9]) for p in m.parameters() if p.dim() == 1]
    assert sorted(norms) == sorted(map(id, expected))
    assert sorted(norms + others) == sorted(map(id, model.parameters()))
    assert groups[0]["rho"] == 0.7 and groups[1]["perturb"] is False and "rho" not in groups[1]
    with pytest.raises(ValueError, match="no norm layer"):
        fused_sam.norm_only_groups(nn.Linear(2, 2))


def test_norm_only_perturbs_only_norm_layers(backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = fused_sam.SAM(fused_sam.norm_only_groups(model, rho=0.5), lr=0.1, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    nets.loss_of(model, 0).backward()
    optimizer.first_step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, False, False]
    change = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(change.norm()) == pytest.approx(0.5, rel=1e-5)
