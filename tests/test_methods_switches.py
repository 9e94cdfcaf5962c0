"""Switches of methods that follow their authors' programs: 10 steps of the formula in float64, three groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import nets
from support.bits import Snapshot
from support.family import (
    GROUP_OF,
    GROUPS,
    STEPS,
    Problem,
    Vector,
    assert_weights,
    dot,
    model_and_groups,
    options,
    sam_steps,
)
from torch import Tensor, nn

import fused_sam
from fused_sam import SAM
from fused_sam.training import sam_step

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
DECAY = [GROUPS[k].get("weight_decay", 0.0) for k in GROUP_OF]


def plus(a: Vector, b: Vector, alpha: float | Tensor = 1.0) -> Vector:
    return [x + alpha * y for x, y in zip(a, b, strict=True)]


def centred(v: Vector) -> Vector:
    return [x - x.mean(1, keepdim=True) if x.dim() > 1 else x for x in v]


def norm(v: Vector, p: Problem) -> float:
    """Return the norm over the perturbed groups."""
    return math.sqrt(sum(float(x.square().sum()) for x, on in zip(v, p.perturbed, strict=True) if on))


# ---- GSAM -----------------------------------------------------------------------------------------------------------


@DTYPES
def test_gsam_of_the_loss_at_w(backend: str, dtype: torch.dtype) -> None:
    """big_vision's gsam.py, minimize_fp=False: d = g + alpha times the part of g_s at right angles to g."""
    model, groups = model_and_groups(dtype)
    sam_steps(model, fused_sam.GSAM(groups, alpha=0.6, minimize_fp=False, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        g_s = p.gradient(p.perturb(g), step)
        residual = plus(g_s, g, -dot(g, g_s) / dot(g, g))
        assert abs(float(dot(residual, g))) < 1e-9
        p.update(plus(g, residual, 0.6))
    assert_weights(model, p.w)


def test_gsam_of_the_loss_at_w_without_alpha_is_the_base_optimizer(backend: str) -> None:
    model, groups = model_and_groups(torch.float64)
    sam_steps(model, fused_sam.GSAM(groups, alpha=0.0, minimize_fp=False, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        p.update(p.gradient(p.w, step))
    assert_weights(model, p.w)


def test_gsam_of_the_loss_at_w_with_a_first_gradient_of_zero(backend: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = fused_sam.GSAM([p], alpha=0.5, minimize_fp=False, lr=1.0, backend=backend)
    p.grad = torch.zeros(2)
    optimizer.first_step()
    p.grad = torch.tensor([0.5, 0.0])
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.75, 1.0]))


# ---- GCSAM ----------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("norm_of", ["centralised", "gradient"])
@pytest.mark.parametrize("both", [False, True], ids=["ascent", "both"])
def test_gcsam(backend: str, dtype: torch.dtype, norm_of: str, both: bool) -> None:
    """arXiv 2501.11584: the equation centralises both gradients, and the program divides by ||g||."""
    model, groups = model_and_groups(dtype)
    optimizer = fused_sam.GCSAM(groups, length=norm_of, centralise_descent=both, backend=backend, **options())
    sam_steps(model, optimizer)
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        c = centred(g)
        factor = norm(c, p) / norm(g, p) if norm_of == "gradient" else 1.0
        g_s = p.gradient(p.perturb(c, factor=factor), step)
        p.update(centred(g_s) if both else g_s)
    assert_weights(model, p.w)
    assert optimizer.shortened is None


def test_gcsam_by_the_whole_norm_refuses_adaptive_groups_and_changes_nothing(backend: str) -> None:
    model, groups = model_and_groups(torch.float32)
    groups[1]["adaptive"] = True
    optimizer = fused_sam.GCSAM(groups, length="gradient", backend=backend, **options())
    before = Snapshot(optimizer)
    nets.loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="set adaptive=False in group 1"):
        optimizer.first_step()
    before.assert_unchanged()
    assert not optimizer.perturbed


def test_gcsam_leaves_the_update_alone_in_steps_that_do_not_perturb(backend: str) -> None:
    model, groups = model_and_groups(torch.float64)
    schedule = fused_sam.schedule.Every(2)
    sam_steps(
        model, fused_sam.GCSAM(groups, centralise_descent=True, schedule=schedule, backend=backend, **options())
    )
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        p.update(g if step % 2 else centred(p.gradient(p.perturb(centred(g)), step)))
    assert_weights(model, p.w)


# ---- MomentumSAM ----------------------------------------------------------------------------------------------------


@DTYPES
def test_momentum_sam_with_the_authors_decay_of_sgd(backend: str, dtype: torch.dtype) -> None:
    """MSAM's program: d_p.add_(param, alpha=weight_decay) with the displaced param."""
    model, groups = model_and_groups(dtype)
    groups[0]["weight_decay"] = 0.3
    sam_steps(model, fused_sam.MomentumSAM(groups, authors_decay=True, backend=backend, **options()))
    p = Problem()
    decay = [0.3 if k == 0 else 0.0 for k in GROUP_OF]
    for step in range(STEPS):
        at = p.w if step == 0 else p.perturb([v for v in p.v if v is not None], factor=-1.0)
        g = [x + wd * w for x, wd, w in zip(p.gradient(at, step), decay, at, strict=True)]
        # Problem.update adds each group's own decay of the clean weights, which is 0.01 in group 0.
        p.update([x - own * w for x, own, w in zip(g, DECAY, p.w, strict=True)])
    assert_weights(model, p.perturb([v for v in p.v if v is not None], factor=-1.0))


@DTYPES
def test_momentum_sam_with_the_authors_decay_of_adamw(backend: str, dtype: torch.dtype) -> None:
    """MSAM's program: param.mul_(1 - lr * weight_decay) after Adam's update."""
    model, twin = nets.net(dtype=dtype), nets.net(dtype=torch.float64)
    own = {"lr": 0.02, "betas": (0.8, 0.9)}
    optimizer = fused_sam.MomentumSAM(
        [{"params": list(model.parameters())[:2], "weight_decay": 0.5}, {"params": list(model.parameters())[2:]}],
        torch.optim.AdamW, rho=0.3, weight_decay=0.2, authors_decay=True, backend=backend, **own,
    )  # fmt: skip
    base = torch.optim.AdamW(twin.parameters(), weight_decay=0.0, foreach=False, **own)
    params = list(twin.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        nets.loss_of(model, step).backward()
        optimizer.step()
        clean = [p.detach().clone() for p in params]
        with torch.no_grad():
            if step:
                m = [base.state[p]["exp_avg"] for p in params]
                length = math.sqrt(sum(float(x.square().sum()) for x in m))
                for p, x in zip(params, m, strict=True):
                    p -= 0.3 * x / length
        base.zero_grad()
        nets.loss_of(twin, step).backward()
        with torch.no_grad():
            for p, w in zip(params, clean, strict=True):
                p.copy_(w)
        base.step()
        with torch.no_grad():
            for i, p in enumerate(params):
                p *= 1 - 0.02 * (0.5 if i < 2 else 0.2)
    optimizer.eval()
    for p, q in zip(model.parameters(), params, strict=True):
        # Adam divides by small roots: fp32 errors of ten steps grow to 1e-5 of weights of size 1.
        torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-11 if dtype is torch.float64 else 5e-5)


def test_the_authors_decay_leaves_out_weights_without_a_gradient(backend: str) -> None:
    for base, own in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        optimizer = fused_sam.MomentumSAM(
            [a, b], base, lr=0.1, weight_decay=0.5, authors_decay=True, backend=backend, **own
        )
        a.grad = torch.zeros(3)
        optimizer.step()
        optimizer.eval()
        torch.testing.assert_close(a.detach(), torch.full((3,), 0.95))
        assert torch.equal(b, torch.ones(2))
        assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(fused_sam.MomentumSAM, base_optimizer=torch.optim.Adam), TypeError, "for SGD and AdamW"),
        (partial(fused_sam.MomentumSAM, base_optimizer=fused_sam.Lion), TypeError, "for SGD and AdamW"),
        (
            lambda p, **own: fused_sam.MomentumSAM(
                [q.bfloat16() for q in p], momentum=0.9, stochastic_rounding=True, **own
            ),
            ValueError,
            "use master_weights",
        ),
    ],
)
def test_the_authors_decay_of_other_bases_is_an_error(
    make: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make([torch.ones(3)], lr=0.1, authors_decay=True)


# ---- the L2 term in the ascent --------------------------------------------------------------------------------------


def with_decay(g: Vector, w: Vector, decay: list[float]) -> Vector:
    return [x + wd * y for x, wd, y in zip(g, decay, w, strict=True)]


@DTYPES
@pytest.mark.parametrize("method", ["SAM", "GSAM", "GCSAM"])
def test_the_ascent_with_the_l2_term(backend: str, dtype: torch.dtype, method: str) -> None:
    """Google's SAM program: the perturbation follows g + weight_decay w. The update has its L2 term as usual."""
    model, groups = model_and_groups(dtype)
    for group, wd in zip(groups, (0.5, 0.2, 0.4), strict=True):
        group["weight_decay"] = wd
    cls = fused_sam.METHODS[method]
    optimizer = cls(groups, decay_in_ascent=True, backend=backend, **options())
    assert optimizer.needs_grad_scale
    sam_steps(model, optimizer)
    p = Problem()
    decay = [(0.5, 0.2, 0.4)[k] for k in GROUP_OF]
    perturbed = [wd if on else 0.0 for wd, on in zip(decay, p.perturbed, strict=True)]
    for step in range(STEPS):
        g = with_decay(p.gradient(p.w, step), p.w, perturbed)
        ascent = centred(g) if method == "GCSAM" else g
        g_s = p.gradient(p.perturb(ascent), step)
        if method == "GSAM":
            along = dot(g, g_s) / dot(g_s, g_s)
            g_s = plus(plus(g_s, g_s, 0.4 * along), g, -0.4)
        missing = [wd - own for wd, own in zip(decay, DECAY, strict=True)]  # Problem.update adds DECAY itself
        p.update(with_decay(g_s, p.w, missing))
    assert_weights(model, p.w)


def test_the_l2_term_counts_without_the_loss_scale(backend: str) -> None:
    def train(scaler: Any) -> list[nn.Parameter]:
        model = nets.net(dtype=torch.float64)
        optimizer = SAM(
            model.parameters(), rho=0.3, lr=0.1, weight_decay=0.5, decay_in_ascent=True, momentum=0.9, backend=backend
        )
        for step in range(5):
            batch = nets.batch(step, torch.float64)
            sam_step(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batch, optimizer, scaler=scaler)
        return list(model.parameters())

    scaled = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for p, q in zip(train(None), train(scaled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_loss_scale_that_was_not_told_is_an_error_with_the_l2_term(backend: str) -> None:
    model = nets.net()
    optimizer = SAM(model.parameters(), lr=0.1, weight_decay=0.5, decay_in_ascent=True, backend=backend)
    scaler = torch.amp.GradScaler("cpu")
    before = Snapshot(optimizer)
    for half in (0, 1):
        scaler.scale(nets.loss_of(model, 0)).backward()
        if half == 0:
            optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"first_step\(grad_scale=scaler.get_scale\(\)\)"):
        scaler.step(optimizer)
    before.assert_unchanged()


def test_the_l2_term_of_masters_is_that_of_the_masters(backend: str) -> None:
    p = nn.Parameter(torch.full((64,), 2.0, dtype=torch.bfloat16))
    optimizer = SAM(
        [p], rho=8.0, lr=0.5, weight_decay=0.25, decay_in_ascent=True, master_weights=True, backend=backend
    )
    p.grad = torch.full((64,), 0.5, dtype=torch.bfloat16)
    optimizer.first_step()  # 0.5 + 0.25 * 2 = 1, whose norm is 8: e = 1
    assert torch.equal(p, torch.full_like(p, 3.0))
    p.grad = torch.full((64,), 0.5, dtype=torch.bfloat16)
    optimizer.second_step()
    assert torch.equal(p, torch.full_like(p, 1.5))


@pytest.mark.parametrize(
    ("base", "own", "message"),
    [
        (torch.optim.AdamW, {}, "AdamW has no weight decay that is a part of the gradient"),
        (torch.optim.Adam, {"decoupled_weight_decay": True}, "Adam has no weight decay"),
        (fused_sam.Lion, {}, "Lion has no weight decay"),
        (torch.optim.Rprop, {}, "Rprop has no weight decay"),
        (torch.optim.SGD, {"maximize": True}, "maximize=True in group 0"),
    ],
)
def test_the_l2_term_of_bases_without_one_is_an_error(base: type[Any], own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAM([nn.Parameter(torch.ones(2))], base, lr=0.1, decay_in_ascent=True, **own)


def test_the_l2_term_of_an_added_group_is_checked() -> None:
    optimizer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, decay_in_ascent=True)
    with pytest.raises(ValueError, match="maximize=True in group 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "maximize": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("method", ["MomentumSAM", "AsyncSAM", "RandomSAM", "FlatLoRA"])
def test_the_l2_term_without_an_ascent_gradient_is_an_error(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} has no ascent gradient"):
        fused_sam.METHODS[method]([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, decay_in_ascent=True)
