"""Every method of the SAM family takes the steps of its paper's formula: 10 steps in float64, three groups."""

from __future__ import annotations

import pytest
import torch
from support import nets
from support.family import STEPS, Problem, Vector, assert_weights, dot, model_and_groups, options, sam_steps
from torch import Tensor, nn

import fused_sam
from fused_sam.backends.contract import MASK
from fused_sam.backends.rng import mask_of, stream_key

pytestmark = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def plus(a: Vector, b: Vector, alpha: float | Tensor = 1.0) -> Vector:
    return [x + alpha * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("scale", ["matrices", "all", ("weight",)], ids=str)
def test_asam(backend: str, dtype: torch.dtype, scale: str) -> None:
    """arXiv 2102.11600. With scale="matrices", T is 1 for tensors of one dimension; here those have no "weight"."""
    model, groups = model_and_groups(dtype)
    for group in groups:
        group["params"] = [(n, p) for n, p in model.named_parameters() for q in group["params"] if p is q]
    sam_steps(model, fused_sam.ASAM(groups, eta=0.05, scale=scale, backend=backend, **options()))
    p = Problem()

    def scaled(w: Tensor) -> Tensor:
        return w.abs() + 0.05 if w.dim() > 1 or scale == "all" else torch.ones_like(w)

    for step in range(STEPS):
        p.update(p.gradient(p.perturb(p.gradient(p.w, step), scale=scaled), step))
    assert_weights(model, p.w)


@pytest.mark.parametrize("by_hand", [False, True], ids=["closure", "by hand"])
def test_microbatch(backend: str, dtype: torch.dtype, by_hand: bool) -> None:
    """arXiv 2212.04343: each micro-batch has its own perturbation, and the update uses the mean of the gradients."""
    k = 4
    model, groups = model_and_groups(dtype)
    optimizer = fused_sam.MicrobatchSAM(groups, num_microbatches=k, backend=backend, **options())
    parts = [slice(8 * i, 8 * i + 8) for i in range(k)]
    p = Problem()
    for step in range(STEPS):
        x, y = nets.batch(step, dtype)

        def closure(i: int, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(model(x[parts[i]]), y[parts[i]])
            loss.backward()
            return loss

        if by_hand:
            for i in range(k):
                closure(i)
                optimizer.first_step()
                closure(i)
                if i < k - 1:
                    optimizer.next_microbatch()
            optimizer.second_step(zero_grad=True)
        else:
            before = [closure(i).item() for i in range(k)]
            loss = optimizer.step(closure)
            assert abs(float(loss) - sum(before) / k) < 1e-6
        mean = [torch.zeros_like(w) for w in p.w]
        for part in parts:
            mean = plus(mean, p.gradient(p.perturb(p.gradient(p.w, step, part)), step, part), 1 / k)
        p.update(mean)
        assert abs(float(optimizer.update_norm) - float(dot(mean, mean).sqrt())) < 1e-6
    assert_weights(model, p.w)


@pytest.mark.parametrize("k", [1, 3])
def test_looksam(backend: str, dtype: torch.dtype, k: int) -> None:
    """arXiv 2203.02714. Every k-th step takes two passes, and all others take one (D10)."""
    model, groups = model_and_groups(dtype)
    passes: list[int] = []
    optimizer = fused_sam.LookSAM(groups, k=k, alpha=0.3, backend=backend, **options())
    sam_steps(model, optimizer, count=passes)
    assert len(passes) == STEPS + len(range(0, STEPS, k))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        if step % k == 0:
            h = p.gradient(p.perturb(g), step)
            direction = plus(h, g, -dot(g, h) / dot(g, g))
            p.update(h)
        else:
            p.update(plus(g, direction, 0.3 * (dot(g, g) / dot(direction, direction)).sqrt()))
    assert_weights(model, p.w)


def test_gsam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2203.08065."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.GSAM(groups, alpha=0.6, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        h = p.gradient(p.perturb(g), step)
        norm = dot(h, h).sqrt()
        cosine = dot(g, h) / (norm * dot(g, g).sqrt())
        vertical = plus(g, h, -cosine * dot(g, g).sqrt() / norm)
        assert abs(float(dot(vertical, h))) < 1e-9  # the vertical part is at right angles to g_s
        p.update(plus(h, vertical, -0.6))
    assert_weights(model, p.w)


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_friendly(backend: str, dtype: torch.dtype, sigma: float) -> None:
    """arXiv 2403.12350. As in its authors' program, a gradient enters the average after the subtraction."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.FriendlySAM(groups, sigma=sigma, lmbda=0.8, backend=backend, **options()))
    p, m = Problem(), None
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        d = g if m is None else plus(g, m, -sigma)
        m = g if m is None else plus([0.8 * x for x in m], g, 0.2)
        p.update(p.gradient(p.perturb(d), step))
    assert_weights(model, p.w)


def test_gcsam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2501.11584. The norm is of the centralised gradient (D11)."""
    model, groups = model_and_groups(dtype)
    optimizer = fused_sam.GCSAM(groups, backend=backend, **options())
    sam_steps(model, optimizer)
    p = Problem()
    for step in range(STEPS):
        g = [x - x.mean(1, keepdim=True) if x.dim() > 1 else x for x in p.gradient(p.w, step)]
        p.update(p.gradient(p.perturb(g), step))
    assert_weights(model, p.w)


@pytest.mark.parametrize("decouple", [True, False], ids=["decoupled", "coupled"])
def test_wsam(backend: str, dtype: torch.dtype, decouple: bool) -> None:
    """arXiv 2305.15817, as in its authors' program."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.WSAM(groups, gamma=0.8, decouple=decouple, backend=backend, **options()))
    p, a = Problem(), 0.8 / (1 - 0.8)
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        h = p.gradient(p.perturb(g), step)
        if decouple:
            p.update(g)
            p.w = [w - lr * a * (y - x) for w, lr, x, y in zip(p.w, p.lr, g, h, strict=True)]
        else:
            p.update(plus([(1 - a) * x for x in g], h, a))
    assert_weights(model, p.w)


def test_wsam_with_gamma_one_half_is_sam(backend: str, dtype: torch.dtype) -> None:
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.WSAM(groups, gamma=0.5, decouple=False, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        p.update(p.gradient(p.perturb(p.gradient(p.w, step)), step))
    assert_weights(model, p.w)


def test_momentum(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2401.12033: each step takes one pass, at w - rho v / ||v||."""
    model, groups = model_and_groups(dtype)
    passes: list[int] = []
    optimizer = fused_sam.MomentumSAM(groups, backend=backend, **options())
    sam_steps(model, optimizer, count=passes)
    assert len(passes) == STEPS
    p = Problem()
    for step in range(STEPS):
        at = p.w if step == 0 else p.perturb([v for v in p.v if v is not None], factor=-1.0)
        p.update(p.gradient(at, step))
    assert_weights(model, p.perturb([v for v in p.v if v is not None], factor=-1.0))
    optimizer.eval()
    assert_weights(model, p.w)


def test_esam_elements(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2110.03141. The mask comes from the specified random numbers (backends/rng.py)."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.ESAM(groups, beta=0.5, gamma=1.0, seed=7, backend=backend, **options()))
    p, offset = Problem(), 0
    # Random-number streams are numbered in the order in which the groups list the parameters.
    order = [i for k in range(3) for i, j in enumerate([0, 1, 0, 1, 2, 2]) if j == k]
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        masks = [mask_of(stream_key(7, offset, order.index(i), MASK), x, 0.5) for i, x in enumerate(g)]
        perturbed = [torch.where(m, x, w) for m, x, w in zip(masks, p.perturb(g, factor=1 / 0.5), p.w, strict=True)]
        p.update(p.gradient(perturbed, step))
        offset += 2  # the perturbation and the update each raise it by 1
    assert_weights(model, p.w)


def test_esam_tensors(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2110.03141 as in its authors' program: a mask of whole tensors, their norm, and rho / beta."""
    model, groups = model_and_groups(dtype)
    optimizer = fused_sam.ESAM(groups, beta=0.5, gamma=1.0, mask="tensors", seed=3, backend=backend, **options())
    params, masks = list(model.parameters()), []
    p = Problem()
    for step in range(STEPS):
        with optimizer.first_pass():
            on = [x.requires_grad for x in params]
            nets.loss_of(model, step).backward()
        assert [x.grad is not None for x in params] == on and all(x.requires_grad for x in params)
        assert all(on) == (step == 0)  # the first step finds out which weights the loss uses
        chosen = [id(x) in (optimizer.choose() or ()) for x in params]
        optimizer.first_step(zero_grad=True)
        assert step == 0 or on == chosen
        nets.loss_of(model, step).backward()
        optimizer.second_step(zero_grad=True)
        g = [x if keep else torch.zeros_like(x) for x, keep in zip(p.gradient(p.w, step), chosen, strict=True)]
        p.update(p.gradient(p.perturb(g, factor=1 / 0.5), step))
        masks.append(chosen)
    assert_weights(model, p.w)
    assert len({tuple(on) for on in masks}) > 2 and all(any(on) and not on[4] and not on[5] for on in masks)
