"""Every backend equals `reference` in float64 for random shapes, groups, options and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.backends import VARIANTS
from support.campaign import Campaign
from support.draws import doubled, draw_passes, weights
from support.tolerance import assert_close
from torch import Tensor

from fused_sam import SAM

SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.sampled_from([(1023,), (1024,), (1025,), (31, 33), (16385,)]),
)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "rho": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "adaptive": draw(st.booleans()),
        "eta": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "perturb": draw(st.booleans()),
        "lr": draw(st.floats(0, 0.2)),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov or momentum == 0 else draw(st.sampled_from([0.0, 0.4])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
    }


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.lists(st.tuples(st.lists(SHAPES, min_size=1, max_size=4), options()), min_size=1, max_size=3))
    steps = draw(st.integers(1, 3))
    count = sum(len(shapes) for shapes, _ in groups)
    # Most parameters have a gradient in each pass.
    present = draw(
        st.lists(st.lists(st.integers(0, 9), min_size=count, max_size=count), min_size=2 * steps, max_size=2 * steps)
    )
    return {
        "groups": groups,
        "present": [[n > 0 for n in row] for row in present],
        "steps": steps,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 1000)),
        "threads": draw(st.integers(1, 3)),
    }


def test_backends_agree_with_reference(campaign: Campaign) -> None:
    def check(problem: dict[str, Any]) -> None:
        campaign.count(cases=1)
        assert_agreement(problem)

    for number in campaign.rounds(short=1, share=0.03, counts=False):
        drawn = settings(
            max_examples=20 if campaign.long else 60, deadline=None, derandomize=not campaign.long, database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )(given(problems())(check))  # fmt: skip
        (seed(number)(drawn) if campaign.long else drawn)()


def assert_agreement(problem: dict[str, Any]) -> None:
    """Check that a problem has the same solution on every backend."""
    dtype, steps = problem["dtype"], problem["steps"]
    shapes = [shape for group, _ in problem["groups"] for shape in group]
    start = weights(shapes, dtype, problem["seed"])
    passes = [half for both in draw_passes(start, steps, problem["seed"]) for half in both]

    def run(params: list[Any], backend: str) -> tuple[list[Tensor], Tensor]:
        left = iter(params)
        groups = [{"params": [next(left) for _ in group], **own} for group, own in problem["groups"]]
        optimizer = SAM(groups, torch.optim.SGD, backend=backend)
        for i, (gradients, present) in enumerate(zip(passes, problem["present"], strict=True)):
            for p, g, here in zip(params, gradients, present, strict=True):
                p.grad = g.to(p.dtype) if here else None
            (optimizer.second_step if i % 2 else optimizer.first_step)()
        return params, optimizer.grad_norm

    twin = doubled(start)
    expected, norm = run(twin, "reference")
    torch.set_num_threads(problem["threads"])
    for variant in VARIANTS:
        if variant.name == "triton":  # Triton's interpreter is slow, and Triton's tests cover this
            continue
        with variant.active():
            found, found_norm = run(weights(shapes, dtype, problem["seed"]), variant.name)
        assert_close(found, expected, dtype, steps=steps)
        rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
        torch.testing.assert_close(found_norm.double(), norm, rtol=rtol, atol=1e-12)
