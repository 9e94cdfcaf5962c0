"""Norms per tensor and per group, LayerSAM and Look-LayerSAM: against a loop in float64, and their errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import nets
from support.family import GROUP_OF, STEPS, Problem, Vector, assert_weights, dot, model_and_groups, options, sam_steps
from torch import Tensor, nn

import fused_sam
from fused_sam import ESAM, SAM, LayerSAM, LookLayerSAM, Step

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
norms = pytest.mark.parametrize("norm", ["tensor", "group", "global"])


def members(p: Problem, norm: str, i: int) -> list[int]:
    """Return the numbers of the tensors over which the norm for tensor i is taken."""
    if norm == "tensor":
        return [i]
    return [j for j, k in enumerate(GROUP_OF) if p.perturbed[j] and (norm == "global" or k == GROUP_OF[i])]


def length(x: Vector, rows: list[int]) -> Tensor:
    return sum((x[j].square().sum() for j in rows), torch.zeros((), dtype=torch.float64)).sqrt()


def perturbed(p: Problem, g: Vector, norm: str, *, layers: bool) -> Vector:
    """Return w + rho g / ||g||, times ||w|| if `layers`, with the norms that the option asks for."""
    moved = []
    for i, (w, d) in enumerate(zip(p.w, g, strict=True)):
        if not p.perturbed[i]:
            moved.append(w)
            continue
        rows = members(p, norm, i)
        moved.append(w + p.rho[i] / length(g, rows) * (length(p.w, rows) if layers else 1.0) * d)
    return moved


@dtypes
@norms
@pytest.mark.parametrize("layers", [False, True], ids=["SAM", "LayerSAM"])
def test_against_the_formula(backend: str, dtype: torch.dtype, norm: str, layers: bool) -> None:
    """e_l = rho ||w_l|| g_l / ||g_l|| (arXiv 2203.02714), and without ||w_l|| for SAM, over three groups."""
    model, groups = model_and_groups(dtype)
    method = LayerSAM if layers else SAM
    sam_steps(model, method(groups, norm=norm, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        p.update(p.gradient(perturbed(p, p.gradient(p.w, step), norm, layers=layers), step))
    assert_weights(model, p.w)


@dtypes
def test_look_layer_sam(backend: str, dtype: torch.dtype) -> None:
    """Every k-th step has LayerSAM's perturbation; the decomposition and the reuse are LookSAM's, with global norms."""
    model, groups = model_and_groups(dtype)
    passes: list[int] = []
    sam_steps(model, LookLayerSAM(groups, k=3, alpha=0.3, backend=backend, **options()), count=passes)
    assert len(passes) == STEPS + len(range(0, STEPS, 3))
    p = Problem()
    for step in range(STEPS):
        g = p.gradient(p.w, step)
        if step % 3 == 0:
            h = p.gradient(perturbed(p, g, "tensor", layers=True), step)
            direction = [x - dot(g, h) / dot(g, g) * y for x, y in zip(h, g, strict=True)]
            p.update(h)
        else:
            ratio = 0.3 * (dot(g, g) / dot(direction, direction)).sqrt()
            p.update([x + ratio * v for x, v in zip(g, direction, strict=True)])
    assert_weights(model, p.w)


@norms
def test_adaptive_norms(backend: str, norm: str) -> None:
    """With adaptive=True each norm is that of T g, T = |w| + eta."""
    model, groups = model_and_groups(torch.float64)
    sam_steps(model, SAM(groups, norm=norm, adaptive=True, eta=0.1, backend=backend, **options()))
    p = Problem()
    for step in range(STEPS):
        g, moved = p.gradient(p.w, step), []
        t = [w.abs() + 0.1 for w in p.w]
        scaled = [a * b for a, b in zip(t, g, strict=True)]
        for i, w in enumerate(p.w):
            rows = members(p, norm, i)
            moved.append(w + p.rho[i] * t[i] * scaled[i] / length(scaled, rows) if p.perturbed[i] else w)
        p.update(p.gradient(moved, step))
    assert_weights(model, p.w)


def test_unscaled_tensors_of_asam_belong_to_their_group(backend: str) -> None:
    """norm="group" is over a group's matrices and biases, although T is 1 for biases."""
    params = [nn.Parameter(torch.full((3, 2), 2.0)), nn.Parameter(torch.ones(4))]
    optimizer = fused_sam.ASAM(params, rho=1.0, eta=0.0, norm="group", lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    norm = (6 * 2.0**2 + 4) ** 0.5
    torch.testing.assert_close(params[0].detach(), torch.full((3, 2), 2 + 4 / norm))
    torch.testing.assert_close(params[1].detach(), torch.full((4,), 1 + 1 / norm))


def test_lengths_of_odd_tensors(backend: str) -> None:
    """Each tensor moves by rho ||w||: scalars, empty tensors and mixed dtypes too; one without a gradient stays."""
    shapes, kinds = [(), (0,), (1,), (1027,), (5, 7), (70_001,)], [torch.float32, torch.float64, torch.bfloat16]
    params = [nn.Parameter(torch.randn(s).to(d)) for s in shapes for d in kinds]
    still = nn.Parameter(torch.ones(3))
    before = [p.detach().clone() for p in params]
    optimizer = LayerSAM([*params, still], rho=0.125, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.first_step()
    for p, w in zip(params, before, strict=True):
        moved, own = (p.detach().double() - w.double()).norm(), w.double().norm()
        # A bf16 weight is rounded to 2^-9 of itself, and e is 1/8 of it.
        torch.testing.assert_close(moved, 0.125 * own, rtol=0.05 if p.dtype is torch.bfloat16 else 1e-5, atol=0.0)
    assert torch.equal(still, torch.ones(3))
    optimizer.restore()
    assert all(map(torch.equal, params, before))


def test_a_tensor_without_direction_stays_and_the_others_move(backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, rho=0.5, norm="tensor", lr=0.1, eps=0.0, backend=backend)
    params[0].grad, params[1].grad = torch.zeros(3), torch.tensor([3.0, 0.0, 4.0])
    optimizer.first_step()
    assert torch.equal(params[0], torch.ones(3))
    torch.testing.assert_close(params[1].detach(), torch.tensor([1.3, 1.0, 1.4]))
    assert float(optimizer.grad_norm) == pytest.approx(5.0)


def test_eps_is_added_to_each_norm(backend: str) -> None:
    params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = SAM(params, rho=1.0, norm="tensor", eps=1.0, lr=0.1, backend=backend)
    params[0].grad, params[1].grad = torch.ones(1), torch.full((1,), 3.0)
    optimizer.first_step()
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.tensor([0.5, 0.75]))


def test_equal_steps_are_equal_to_the_bit(backend: str) -> None:
    """The sums have a fixed order, also with several threads."""
    torch.set_num_threads(2)
    start = [torch.randn(50_001), torch.randn(7, 9), torch.randn(1)]
    grads = [torch.randn_like(w) for w in start]
    runs = []
    for _ in range(2):
        params = [nn.Parameter(w.clone()) for w in start]
        optimizer = LayerSAM(params, norm="group", lr=0.1, backend=backend)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.first_step()
        runs.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *runs))


def test_the_loss_scale_does_not_count(backend: str) -> None:
    weights = []
    for scale in (1.0, 2.0**12):
        model = nets.net()
        optimizer = LayerSAM(model.parameters(), rho=0.1, lr=0.1, backend=backend)
        assert not optimizer.needs_grad_scale
        (nets.loss_of(model, 0) * scale).backward()
        optimizer.first_step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_non_finite_tensor_skips_the_whole_step(backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = LayerSAM(params, rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    for p in params:
        p.grad = torch.ones(3)
    params[1].grad[1] = torch.inf  # type: ignore[index]
    optimizer.first_step()
    assert all(torch.equal(p, torch.ones(3)) for p in params)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.second_step()
    assert optimizer.skipped and all(torch.equal(p, torch.ones(3)) for p in params)
    assert not any(optimizer.state.values())


@norms
def test_momentum_sam_displaces_per_norm(backend: str, norm: str) -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = fused_sam.MomentumSAM(params, rho=1.0, lr=0.0, momentum=0.5, norm=norm, backend=backend)
    optimizer.train()
    params[0].grad, params[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer.step()
    moved = torch.cat([p.detach() for p in params])
    expected = {"tensor": [0.6, 0.8, 1.0], "group": [3 / 13, 4 / 13, 12 / 13], "global": [3 / 13, 4 / 13, 12 / 13]}
    torch.testing.assert_close(moved, -torch.tensor(expected[norm]))


def test_copies_keep_the_norm() -> None:
    optimizer = copy.deepcopy(LayerSAM([nn.Parameter(torch.full((4,), 2.0))], rho=0.5, norm="group", lr=0.1))
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(4)
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 3.0))


# ---- methods over Step ----------------------------------------------------------------------------------------------


def test_a_method_reads_norms_and_returns_a_length_per_parameter(backend: str) -> None:
    class Own(SAM):
        reads_weight_norms = True
        seen: Any = None

        def radius(self, step: Step) -> Any:
            Own.seen = step.ascent_norms, step.weight_norms
            return torch.tensor([1.0, 2.0, 4.0])

    params = [nn.Parameter(torch.full((1,), x)) for x in (3.0, -4.0, 5.0)]
    optimizer = Own(params[:2], norm="tensor", lr=0.1, backend=backend)
    optimizer.add_param_group({"params": params[2:], "rho": 0.0})
    for p, g in zip(params, (2.0, -3.0, 1.0), strict=True):
        p.grad = torch.full((1,), 4 * g)
    optimizer.first_step(grad_scale=4.0)
    torch.testing.assert_close(Own.seen[0], torch.tensor([2.0, 3.0, 1.0]), check_dtype=False)
    torch.testing.assert_close(Own.seen[1], torch.tensor([3.0, 4.0, 5.0]), check_dtype=False)
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.tensor([4.0, -6.0, 5.0]))


def test_numbers_and_rho_times_a_number_count_per_tensor() -> None:
    class Fixed(SAM):
        def radius(self, step: Step) -> Any:
            return 2.0

    class Unnormalised(SAM):
        def radius(self, step: Step) -> Any:
            return step.rho * step.ascent_norms

    for method, expected in ((Fixed, [2.0, 2.0]), (Unnormalised, [1.5, 0.5])):
        params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        optimizer = method(params, rho=0.5, norm="tensor", lr=0.1)
        params[0].grad, params[1].grad = torch.full((1,), 3.0), torch.ones(1)
        optimizer.first_step()
        torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.tensor(expected))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm must be 'global' or 'group' or 'tensor', not 'layer'"):
        SAM([nn.Parameter(torch.ones(2))], norm="layer", lr=0.1)


def test_a_group_has_no_norm_of_its_own() -> None:
    with pytest.raises(ValueError, match="group 0 sets norm, which is one for all groups"):
        SAM([{"params": [nn.Parameter(torch.ones(2))], "norm": "tensor"}], lr=0.1)


@pytest.mark.parametrize("mask", ["elements", "tensors"])
@pytest.mark.parametrize("norm", ["tensor", "group"])
def test_esams_masks_take_the_global_norm(norm: str, mask: str) -> None:
    with pytest.raises(ValueError, match=f"norm='{norm}' cannot be combined with ESAM's masks"):
        ESAM([nn.Parameter(torch.ones(2))], norm=norm, mask=mask, lr=0.1)


def test_a_methods_own_mask_takes_the_global_norm() -> None:
    class Masked(SAM):
        mask_prob = 0.5

    optimizer = Masked([p := nn.Parameter(torch.ones(2))], norm="tensor", lr=0.1)
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r'mask_prob=0\.5 perturbs a part of each tensor.* leave norm="global"'):
        optimizer.first_step()
    assert torch.equal(p, torch.ones(2)) and not optimizer.perturbed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ascent_norms", 'step.ascent_norms needs norm="tensor" or norm="group"'),
        ("weight_norms", "step.weight_norms are taken if the class sets reads_weight_norms = True"),
    ],
)
def test_norms_that_were_not_taken_are_refused(name: str, said: str) -> None:
    class Own(SAM):
        def radius(self, step: Step) -> Any:
            return getattr(step, name)

    optimizer = Own([p := nn.Parameter(torch.ones(2))], lr=0.1)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=said):
        optimizer.first_step()
    assert torch.equal(p, torch.ones(2))


def test_norms_are_not_known_before_radius() -> None:
    class Own(SAM):
        def ascent(self, step: Step) -> None:
            step.ascent_norms  # noqa: B018

    optimizer = Own([p := nn.Parameter(torch.ones(2))], norm="tensor", lr=0.1)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Own.ascent\(\): step.ascent_norms is not known before `radius`"):
        optimizer.first_step()


def test_lengths_of_another_number_than_parameters_are_refused() -> None:
    class Own(SAM):
        def radius(self, step: Step) -> Any:
            return torch.ones(3)

    for norm in ("tensor", "global"):
        optimizer = Own([p := nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))], norm=norm, lr=0.1)
        p.grad = torch.ones(2)
        with pytest.raises(
            TypeError, match=r'Own.radius\(\) must return .* one number per parameter with norm="tensor"'
        ):
            optimizer.first_step()
        assert torch.equal(p, torch.ones(2))
