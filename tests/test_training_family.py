"""Tests of sam_step() with every method: micro-batches, loss scales, whole tensors, selection, and one pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import family
from support.bits import assert_same_bits
from support.nets import batch, net
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

import fused_sam
from fused_sam.schedule import AdaptiveSchedule, Every
from fused_sam.training import sam_step

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.2}


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 11, 9, 7)])
def test_msam_is_the_mean_over_micro_batches(sizes: tuple[int, ...], scaled: bool) -> None:
    model = net(dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer = fused_sam.MicrobatchSAM(model.parameters(), num_microbatches=4, **BASE)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**6) if scaled else None
    for step in range(3):
        x, y = batch(step, torch.float64)
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        even = len(set(sizes)) == 1
        result = sam_step(model, mean_loss, (x, y) if even else None, optimizer, scaler=scaler,
                          microbatches=1 if even else parts)  # fmt: skip
        total = [torch.zeros_like(p) for p in twin.parameters()]
        mean = 0.0
        for part in parts:
            weight = len(part[0]) / 32
            loss = mean_loss(twin, part)
            mean += float(loss.detach()) * weight
            g = torch.autograd.grad(loss, list(twin.parameters()))
            norm = torch.cat([v.flatten() for v in g]).norm()
            perturbed = copy.deepcopy(twin)
            with torch.no_grad():
                for p, v in zip(perturbed.parameters(), g, strict=True):
                    p.add_(0.2 / norm * v)
            up = torch.autograd.grad(mean_loss(perturbed, part), list(perturbed.parameters()))
            total = [t + weight * v for t, v in zip(total, up, strict=True)]
        for p, t in zip(twin.parameters(), total, strict=True):
            p.grad = t
        base.step()
        assert float(result.loss) == pytest.approx(mean) and result.perturbed_loss is not None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)  # float64 sums in another order


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"microbatches": 3}, "num_microbatches=4"), ({"ascent_fraction": 0.5}, "ascent_fraction must be 1")],
)
def test_msam_needs_its_own_number_of_micro_batches(keywords: dict[str, Any], message: str) -> None:
    model = net()
    optimizer = fused_sam.MicrobatchSAM(model.parameters(), num_microbatches=4, **BASE)
    with pytest.raises(ValueError, match=message):
        sam_step(model, mean_loss, batch(0), optimizer, **keywords)


def test_an_exception_in_a_late_micro_batch_undoes_the_step() -> None:
    model = net()
    optimizer = fused_sam.MicrobatchSAM(model.parameters(), num_microbatches=4, **BASE)
    before = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def fails(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyError
        return mean_loss(model, batch)

    with pytest.raises(KeyError):
        sam_step(model, fails, batch(0), optimizer)
    assert_same_bits(model.parameters(), before)
    sam_step(model, mean_loss, batch(0), optimizer)


CASES: dict[str, dict[str, dict[str, Any]]] = {
    **family.CASES,
    "SAM": {"SAM": {}, "AE-SAM": {"schedule": AdaptiveSchedule(20)}},
    "ESAM": {"ESAM": {"gamma": 1.0}, "ESAM, tensors": {"gamma": 1.0, "mask": "tensors"}},
    "LookSAM": {"LookSAM": {"k": 2}},
}
METHODS = family.cases({**fused_sam.METHODS, **family.EXAMPLES}, CASES)


@pytest.mark.parametrize("method", METHODS)
def test_a_changing_loss_scale_does_not_change_the_weights(method: str) -> None:
    model = net(dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer, other = (METHODS[method](m.parameters(), **BASE) for m in (model, twin))
    scaler = GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    for step in range(6):
        sam_step(model, mean_loss, batch(step, torch.float64), optimizer, scaler=scaler)
        sam_step(twin, mean_loss, batch(step, torch.float64), other)
    assert scaler.get_scale() == 2.0**7
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)  # float64 rounding; the scales are powers of two


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fused_sam.SAM, {"schedule": Every(2)}),
        (fused_sam.FriendlySAM, {"schedule": Every(2)}),
        (fused_sam.SAM, {"rho": 0.0}),
        (fused_sam.MomentumSAM, {}),
    ],
    ids=["schedule", "FriendlySAM", "rho 0", "MomentumSAM"],
)
def test_a_step_without_a_perturbation_uses_the_whole_batch(cls: Any, options: dict[str, Any]) -> None:
    sizes: list[int] = []

    def counting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append(len(batch[0]))
        return mean_loss(model, batch)

    model = net(dtype=torch.float64)
    optimizer = cls(model.parameters(), **{**BASE, **options})
    for step in range(2):
        sam_step(model, counting, batch(step, torch.float64), optimizer, ascent_fraction=0.25)
    assert sizes == ([8, 32, 32] if "schedule" in options else [32, 32])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (fused_sam.GSAM, {}, "GSAM updates the weights with the first gradient"),
        (fused_sam.WSAM, {}, "WSAM updates the weights with the first gradient"),
        (fused_sam.LookSAM, {}, "LookSAM updates the weights with the first gradient"),
        (fused_sam.SAM, {"schedule": AdaptiveSchedule(9)}, "AdaptiveSchedule decides by the first gradient"),
    ],
)
def test_a_partial_ascent_is_an_error_if_the_update_uses_it(cls: Any, options: dict[str, Any], message: str) -> None:
    model = net()
    optimizer = cls(model.parameters(), **BASE, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        sam_step(model, mean_loss, batch(0), optimizer, ascent_fraction=0.25)
    assert_same_bits(model.parameters(), before)


def test_esam_selects_samples() -> None:
    model = net()
    optimizer = fused_sam.ESAM(model.parameters(), beta=0.5, gamma=0.25, seed=3, **BASE)
    sizes: list[tuple[int, bool]] = []

    def counting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append((len(batch[0]), torch.is_grad_enabled()))
        return losses(model, batch)

    sam_step(model, counting, batch(0), optimizer)
    assert sizes == [(32, True), (32, False), (8, True)]
    with pytest.raises(ValueError, match="one loss per sample"):
        sam_step(model, mean_loss, batch(0), optimizer)
