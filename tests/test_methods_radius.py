"""LE-SAM, unnormalised SAM and Stable-SAM take the steps of their formulas: 10 steps in float64, three groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.family import STEPS, Problem, Vector, assert_weights, model_and_groups, options, sam_steps
from torch import nn

import fused_sam

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def norm(v: Vector, p: Problem) -> float:
    """Return the norm over the perturbed groups."""
    return math.sqrt(sum(float(x.square().sum()) for x, on in zip(v, p.perturbed, strict=True) if on))


@DTYPES
def test_stable_sam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2401.07250: d = (||g|| / ||g_s||) g_s. Both norms are over the perturbed groups."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.StableSAM(groups, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        g_s = p.gradient(p.perturb(g), step)
        p.update([norm(g, p) / norm(g_s, p) * x for x in g_s])
    assert_weights(model, p.w)


@DTYPES
def test_unnormalised_sam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2206.06232: e = rho g, with each group's rho."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.UnnormalisedSAM(groups, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        p.update(p.gradient(p.perturb(g, factor=norm(g, p)), step))
    assert_weights(model, p.w)


@DTYPES
def test_le_sam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2605.10183: ||e|| = min(sigma_t / ||g||, rho_max). sigma_t has its program's warm-up and cosine."""
    model, groups = model_and_groups(dtype)
    own = {"total": 8, "sigma": 0.03, "rho_max": 0.15, "warmup": 0.25, "decay_start": 0.5}
    sam_steps(model, fused_sam.LESAM(groups, backend=backend, **own, **options()))
    p, lengths = Problem(), []
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        sigma = [0.0, 0.015, 0.03, 0.03, 0.03][step] if step < 5 else 0.0
        if 5 <= step < 8:
            sigma = 0.03 * (1 + math.cos(math.pi * (step - 4) / 4)) / 2
        lengths.append(min(sigma / norm(g, p), 0.15))
        p.rho = [lengths[-1]] * len(p.rho)
        p.update(p.gradient(p.perturb(g), step))
    assert_weights(model, p.w)
    assert lengths[0] == lengths[-1] == 0, "warm-up and decay are met"
    assert 0.15 in lengths and any(0 < length < 0.15 for length in lengths), "both sides of rho_max are met"


@DTYPES
def test_le_sam_without_warm_up_falls_from_the_start(backend: str, dtype: torch.dtype) -> None:
    model, groups = model_and_groups(dtype)
    own = {"total": 8, "sigma": 0.03, "rho_max": 0.3, "warmup": 0.0, "decay_start": 0.0}
    sam_steps(model, fused_sam.LESAM(groups, backend=backend, **own, **options()))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        sigma = 0.03 * (1 + math.cos(math.pi * min(1.0, step / 8))) / 2
        p.rho = [min(sigma / norm(g, p), 0.3)] * len(p.rho)
        p.update(p.gradient(p.perturb(g), step))
    assert_weights(model, p.w)


def test_unnormalised_sam_of_an_adaptive_group(backend: str) -> None:
    """e = rho T^2 g."""
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = fused_sam.UnnormalisedSAM([p], rho=0.5, adaptive=True, eta=1.0, lr=0.1, backend=backend)
    p.grad = torch.tensor([0.25, 0.5])
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.tensor([3 + 0.5 * 16 * 0.25, -2 + 0.5 * 9 * 0.5]))


@DTYPES
def test_stable_sam_of_adaptive_groups(backend: str, dtype: torch.dtype) -> None:
    """The norm that perturbs is ||T g|| then, and the gradient's length is ||g||."""
    model, groups = model_and_groups(dtype)
    optimizer = fused_sam.StableSAM(groups, adaptive=True, eta=0.1, backend=backend, **options())
    sam_steps(model, optimizer)
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        g_s = p.gradient(p.perturb(g, scale=lambda w: w.abs() + 0.1), step)
        p.update([norm(g, p) / norm(g_s, p) * x for x in g_s])
    assert_weights(model, p.w)
    assert optimizer.first_norm is None


def test_stable_sam_leaves_a_second_gradient_of_zero(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = fused_sam.StableSAM([p], rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    for first, second in ((1.0, 0.0), (1.0, 2.0)):
        p.grad = torch.full((3,), first)
        optimizer.first_step()
        p.grad = torch.full((3,), second)
        optimizer.second_step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))  # the second step: ||g|| is half of ||g_s||


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({}, TypeError, "LESAM needs the option total"),
        ({"total": 0}, ValueError, "total must be at least 1"),
        ({"total": 8.0}, TypeError, "total must be a whole number"),
        ({"total": 8, "rho_max": 0.0}, ValueError, "rho_max must be above 0"),
        ({"total": 8, "warmup": 1.5}, ValueError, "warmup must be from 0 to 1"),
        ({"total": 8, "decay_start": 1.0}, ValueError, "decay_start must be at least 0 and below 1"),
    ],
)
def test_options_of_le_sam_out_of_range_are_errors(
    own: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fused_sam.LESAM([nn.Parameter(torch.ones(2))], lr=0.1, **own)
