"""Every backend equals `reference` in float64, for all dtypes, sizes, options and layouts.

The gradients are given and not computed, so that rounding of one step does not reach the gradients of the next.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import SUMS_IN_FP32, Variant
from support.draws import LAYOUTS, ODD_SHAPES, doubled, draw_passes, take_steps, values, weights
from support.tolerance import assert_close
from torch import Tensor, nn

from fused_sam import SAM

STEPS = 3
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SMALL = [(7,), (33, 3), (), (0,), (1025,)]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
    "decay": {"lr": 0.1, "weight_decay": 0.05},
    "maximize": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "maximize": True},
    "adaptive": {"lr": 0.1, "momentum": 0.9, "adaptive": True},
    "eta": {"lr": 0.1, "momentum": 0.9, "adaptive": True, "eta": 0.5},
}


def compare(variant: Variant, params: list[nn.Parameter], groups: list[dict[str, Any]], **options: Any) -> None:
    """Take equal steps with `variant` and float64 `reference`, and compare. `groups` list parameters by number."""
    twin = doubled(params)
    passes = draw_passes(params, STEPS)

    def optimizer(over: list[nn.Parameter], backend: str) -> SAM:
        own = [{**group, "params": [over[i] for i in group["params"]]} for group in groups]
        return SAM(own, torch.optim.SGD, backend=backend, **options)

    ours, reference = optimizer(params, variant.name), optimizer(twin, "reference")
    perturbed = take_steps(ours, params, passes)
    expected = take_steps(reference, twin, [([g.double() for g in a], [g.double() for g in b]) for a, b in passes])

    dtype = params[0].dtype
    for step, (found, wanted) in enumerate(zip(perturbed, expected, strict=True)):
        assert_close(found, wanted, dtype, steps=step + 1)
    assert_close(params, twin, dtype, steps=STEPS)
    for p, q in zip(params, twin, strict=True):
        assert ours.state[p].keys() == reference.state[q].keys()
        for name, buffer in ours.state[p].items():
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            assert buffer.dtype is wide, f"{name} of a {dtype} weight is {buffer.dtype}"
            # The buffer is summed in the arithmetic's type, from decayed weights that were rounded to `dtype`.
            assert_close([buffer], [reference.state[q][name]], dtype, steps=STEPS)
    # The norm adds squares in fp64 or fp32. 1e-5 is far above their rounding, and far below the error of a lost tensor.
    torch.testing.assert_close(ours.grad_norm.double(), reference.grad_norm, rtol=norm_rtol(dtype), atol=0)
    torch.testing.assert_close(ours.update_norm.double(), reference.update_norm, rtol=norm_rtol(dtype), atol=0)


def norm_rtol(dtype: torch.dtype) -> float:
    # ASAM's norm uses rounded weights, and the fp64 optimizer differs by that rounding.
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(variant: Variant, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    params = weights(ODD_SHAPES, dtype)
    compare(variant, params, [{"params": range(len(params))}], **OPTIONS["momentum"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(variant: Variant, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = weights(SMALL, dtype)
    compare(variant, params, [{"params": range(len(params))}], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_with_options_of_their_own(variant: Variant, dtype: torch.dtype) -> None:
    """Each group in a table keeps its own options, and the norm is over the perturbed groups."""
    params = weights([*SMALL, *SMALL], dtype)
    groups = [
        {"params": [0, 5], "rho": 0.3, "lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        {"params": [1, 6], "adaptive": True, "eta": 0.1, "momentum": 0.5, "dampening": 0.5},
        {"params": [2, 7], "perturb": False, "lr": 0.01},
        {"params": [3, 8], "rho": 0.0, "maximize": True},
        {"params": [4, 9], "rho": 0.01, "momentum": 0.7, "lr": torch.tensor(0.25)},
    ]
    compare(variant, params, groups, lr=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_of_the_weight(variant: Variant, layout: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(LAYOUTS[layout](values((4, 6, 5, 3), seed, dtype))) for seed in (1, 2)]
    strides = [p.stride() for p in params]
    compare(variant, params, [{"params": [0, 1]}], **OPTIONS["adaptive"])
    assert [p.stride() for p in params] == strides


@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
def test_layout_of_the_gradient(variant: Variant, weight_layout: str, gradient_layout: str) -> None:
    """If a gradient has another layout than its weight, elements are matched by index and not by address."""
    p = nn.Parameter(LAYOUTS[weight_layout](values((4, 6, 5, 3), 1, torch.float32)))
    other = nn.Parameter(values((3, 3), 2, torch.float32))
    twin = doubled([p, other])
    ours = SAM([p, other], rho=0.5, lr=0.1, momentum=0.9, backend=variant.name)
    reference = SAM(twin, rho=0.5, lr=0.1, momentum=0.9, backend="reference")
    for first, second in draw_passes([p, other], STEPS):
        for gradients, half in ((first, "first_step"), (second, "second_step")):
            p.grad = LAYOUTS[gradient_layout](gradients[0])
            other.grad = gradients[1]
            for q, g in zip(twin, gradients, strict=True):
                q.grad = g.double()
            getattr(ours, half)()
            getattr(reference, half)()
            assert_close([p, other], twin, torch.float32, steps=STEPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_gradient_of_a_low_precision_weight(variant: Variant, dtype: torch.dtype) -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype, so a gradient has its weight's dtype")
    params = weights([(1025,), (5, 3)], dtype)
    plain = weights([(33,)], dtype, seed=9)  # its gradient keeps the weight's dtype, which makes two tables
    for p in params:
        p.grad_dtype = torch.float32
    every = params + plain
    twin = doubled(every)
    ours = SAM(every, rho=0.5, lr=0.1, momentum=0.9, backend=variant.name)
    reference = SAM(twin, rho=0.5, lr=0.1, momentum=0.9, backend="reference")
    for step in range(STEPS):
        for half in ("first_step", "second_step"):
            for i, (p, q) in enumerate(zip(every, twin, strict=True)):
                p.grad = values(p.shape, 77 + i + step, torch.float32 if i < 2 else dtype)
                q.grad = p.grad.double()
            getattr(ours, half)()
            getattr(reference, half)()
            assert_close(every, twin, dtype, steps=step + 1)


def test_dtypes_mixed_in_one_optimizer(variant: Variant) -> None:
    params = [nn.Parameter(values((257,), i, dtype)) for i, dtype in enumerate(DTYPES)]
    twin = doubled(params)
    ours = SAM(params, rho=0.5, lr=0.1, momentum=0.9, backend=variant.name)
    reference = SAM(twin, rho=0.5, lr=0.1, momentum=0.9, backend="reference")
    passes = draw_passes(params, STEPS)
    take_steps(ours, params, passes)
    take_steps(reference, twin, passes)
    for p, q in zip(params, twin, strict=True):
        assert_close([p], [q], p.dtype, steps=STEPS)
    torch.testing.assert_close(ours.grad_norm.double(), reference.grad_norm, rtol=1e-5, atol=0)


def test_gradients_that_come_and_go(variant: Variant) -> None:
    """A weight without a gradient stays. A weight with a gradient only in the second pass is updated."""
    params = weights([(7,), (1025,), (3, 2), (33,)], torch.float32)
    twin = doubled(params)
    ours = SAM(params, rho=0.5, lr=0.1, momentum=0.9, dampening=0.1, backend=variant.name)
    reference = SAM(twin, rho=0.5, lr=0.1, momentum=0.9, dampening=0.1, backend="reference")
    patterns = [
        ("1111", "1111"),
        ("0111", "0111"),
        ("1010", "0101"),
        ("0000", "1111"),
        ("1111", "0000"),
        ("1100", "1110"),
    ]
    for first, second in patterns * 2:
        before = [p.detach().clone() for p in params]
        for half, pattern in (("first_step", first), ("second_step", second)):
            for i, (p, q) in enumerate(zip(params, twin, strict=True)):
                p.grad = values(p.shape, 31 * i + len(half), torch.float32) if pattern[i] == "1" else None
                q.grad = None if p.grad is None else p.grad.double()
            getattr(ours, half)()
            getattr(reference, half)()
            assert_close(params, twin, torch.float32, steps=12)
        for p, old, present in zip(params, before, second, strict=True):
            assert torch.equal(p, old) == (present == "0")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
def test_extreme_gradients_still_give_a_perturbation_of_length_rho(variant: Variant, scale: float) -> None:
    """Squares of 1e-30 and 1e18 leave the range of fp32. The norm does not, because a CPU adds in a wider type."""
    if variant.name in SUMS_IN_FP32:
        pytest.skip("its sums are fp32, which does not hold these squares")
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), scale)
    optimizer = SAM([p], rho=0.5, lr=0.1, eps=0.0, backend=variant.name)
    optimizer.first_step()
    assert not optimizer.skipped
    if scale > 1e-25:  # a norm below 1e-30 gives no direction; 1e-30 * sqrt(1000) is just above
        torch.testing.assert_close(p.detach().norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    optimizer.restore()
    assert torch.equal(p, torch.zeros(1000))


@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_a_gradient_of_zeros_moves_no_weight(variant: Variant, eps: float) -> None:
    p = nn.Parameter(torch.ones(10))
    optimizer = SAM([p], rho=0.5, lr=0.1, eps=eps, backend=variant.name)
    p.grad = torch.zeros(10)
    optimizer.first_step()
    assert torch.equal(p, torch.ones(10))
    optimizer.second_step()
    assert torch.equal(p, torch.ones(10)) and not optimizer.skipped


def test_eps_is_added_to_the_norm(variant: Variant) -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = SAM([p], rho=1.0, lr=0.1, eps=3.0, backend=variant.name)
    p.grad = torch.full((4,), 0.5)  # the norm is 1
    optimizer.first_step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.125))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_momentum_of_zero_is_not_a_first_step(variant: Variant, dtype: torch.dtype, zero: float) -> None:
    """Dampening does not apply to the first gradient. It applies to all later ones, even if the first was 0 or -0."""
    p = nn.Parameter(torch.zeros(40, dtype=dtype))
    optimizer = SAM([p], rho=0.0, lr=1.0, momentum=0.5, dampening=0.75, backend=variant.name)
    p.grad = torch.full((40,), zero, dtype=dtype)
    optimizer.step()
    p.grad = torch.ones(40, dtype=dtype)
    optimizer.step()
    assert torch.equal(p, torch.full((40,), -0.25, dtype=dtype))
