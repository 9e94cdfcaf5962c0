"""Parameters and options that torch.optim accepts: SAM trains with them as the plain optimizer does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support import nets
from torch import nn

from fused_sam import SAM

# The cpu kernels multiply and add with one rounding where torch has two: a few fp32 roundings in four steps.
FUSED = 1e-6


def plain_steps(model: nn.Module, optimizer: Any, steps: range = range(4)) -> None:
    nets.train_plain(model, optimizer, steps)


def assert_equal_models(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def sam(params: Any, base: Any, backend: str, **options: Any) -> SAM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SAM(params, base, rho=0.0, backend=backend, **options)


def test_base_options_reach_an_option_that_is_named_as_sams(backend: str) -> None:
    model = nets.net()
    other = copy.deepcopy(model)
    plain = torch.optim.Adadelta(
        [{"params": list(model[0].parameters()), "rho": 0.5}, {"params": list(model[2:].parameters())}], rho=0.8
    )
    groups = [
        {"params": list(other[0].parameters()), "base_options": {"rho": 0.5}},
        {"params": list(other[2:].parameters())},
    ]
    ours = sam(groups, torch.optim.Adadelta, backend, base_options={"rho": 0.8})
    assert [group["rho"] for group in ours.param_groups] == [0.0, 0.0]
    plain_steps(model, plain)
    plain_steps(other, ours)
    assert_equal_models(model, other)

    resumed = sam(groups_like(groups), torch.optim.Adadelta, backend, base_options={"rho": 0.1})
    resumed.load_state_dict(ours.state_dict())
    plain_steps(model, plain, range(4, 7))
    plain_steps(other, resumed, range(4, 7))
    assert_equal_models(model, other)


def groups_like(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"params": list(group["params"])} for group in groups]


def test_the_perturbation_has_sams_rho_where_the_base_has_one_too(backend: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SAM([p], torch.optim.Adadelta, rho=0.5, base_options={"rho": 0.9}, backend=backend)
    p.grad = torch.tensor([0.0, 2.0, 0.0])
    optimizer.first_step()
    assert torch.equal(p.detach(), torch.tensor([0.0, 0.5, 0.0]))
    optimizer.restore()


@pytest.mark.parametrize(
    "frozen",
    [
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, dtype=torch.uint8),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, device="meta"),
    ],
    ids=["int8", "uint8", "complex64", "meta"],
)
def test_frozen_parameters_of_any_dtype_and_device_stay_as_they_are(backend: str, frozen: torch.Tensor) -> None:
    model = nets.net()
    other = copy.deepcopy(model)
    before = frozen.clone()
    plain_steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain_steps(other, sam([frozen, *other.parameters()], torch.optim.SGD, backend, lr=0.1, momentum=0.9))
    assert_equal_models(model, other, FUSED)
    assert frozen.is_meta or torch.equal(frozen, before)


def test_lazy_layers_train_from_their_first_forward_pass(backend: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))

    one, two = model(), model()
    plain = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    ours = sam(two.parameters(), torch.optim.SGD, backend, lr=0.1, momentum=0.9)
    for net, optimizer in ((one, plain), (two, ours)):
        torch.manual_seed(4)
        for step in range(4):
            x, y = nets.batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert_equal_models(one, two, FUSED)


def test_a_parameter_twice_in_a_group_warns_and_counts_once(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SAM([p, p], torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    assert len(optimizer.param_groups[0]["params"]) == 1
    p.grad = torch.ones(3)
    optimizer.first_step()
    assert float((p.detach() - 1).norm()) == pytest.approx(0.5)
    optimizer.second_step()
    assert torch.allclose(p.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RMSprop])
def test_checkpoints_with_plain_step_numbers_resume_wrapped_bases(backend: str, base: type) -> None:
    model = nets.net()
    plain = base(model.parameters(), lr=0.01)
    plain_steps(model, plain)
    other = copy.deepcopy(model)
    old = copy.deepcopy(plain.state_dict())
    for entry in old["state"].values():
        entry["step"] = float(entry["step"])
    ours = sam(other.parameters(), base, backend, lr=0.01)
    ours.load_state_dict(old)
    plain_steps(model, plain, range(4, 7))
    plain_steps(other, ours, range(4, 7))
    assert_equal_models(model, other)
