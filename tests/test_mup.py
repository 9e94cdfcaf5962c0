"""mup_rho_groups scales rho from a base network, and many groups take no more launches than one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import cuda_source
from torch import nn

import fused_sam
from fused_sam import SAM, mup_rho_groups


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.hidden = nn.Linear(width, 3 * width)
        self.back = nn.Conv1d(3 * width, width, 5)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7)
        self.gain = nn.Parameter(torch.ones(()))


def rho_of(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["rho"] for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_the_factors_of_four_times_the_width(norm: str) -> None:
    """n = 4: sqrt(fan_out / fan_in) per tensor; n^(3/2), n^(1/2) and n^(-1/2) under the global norm."""
    found = rho_of(mup_rho_groups(Net(32), Net(8), rho=0.1, norm=norm))
    per_tensor = {"in": 2.0, "hidden": 1.0, "out": 0.5, "none": 1.0}
    factor = per_tensor if norm == "tensor" else {"in": 8.0, "hidden": 2.0, "out": 0.5, "none": 2.0}
    kinds = {
        "embedding.weight": "in", "hidden.weight": "hidden", "hidden.bias": "in", "back.weight": "hidden",
        "back.bias": "in", "norm.weight": "in", "norm.bias": "in", "head.weight": "out", "head.bias": "none",
        "gain": "none",
    }  # fmt: skip
    assert found == {name: pytest.approx(0.1 * factor[kind]) for name, kind in kinds.items()}


def test_the_base_network_keeps_its_rho() -> None:
    (group,) = mup_rho_groups(Net(8), Net(8), rho=0.1, weight_decay=0.3)
    assert group["rho"] == 0.1 and group["weight_decay"] == 0.3 and len(group["params"]) == 10


def test_shapes_and_networks_on_the_meta_device_serve_as_base() -> None:
    with torch.device("meta"):
        base = Net(8)
    shapes = {name: list(p.shape) for name, p in Net(8).named_parameters()}
    assert rho_of(mup_rho_groups(Net(24), base)) == rho_of(mup_rho_groups(Net(24), shapes))


@pytest.mark.parametrize("norm", ["tensor", "global"])
def test_perturbations_have_the_spectral_norm_that_widths_ask_for(norm: str) -> None:
    """A gradient of rank one, with the length that muP gives it: ||e|| is rho sqrt(r_out / r_in) in every layer."""
    n, rho = 16, 0.1
    base = {"into": (4, 3), "hidden": (4, 4), "out": (2, 4)}
    model = nn.ParameterDict({k: nn.Parameter(torch.zeros(s)) for k, s in
                              {"into": (4 * n, 3), "hidden": (4 * n, 4 * n), "out": (2, 4 * n)}.items()})  # fmt: skip
    optimizer = SAM(mup_rho_groups(model, base, rho, norm=norm), norm=norm, lr=0.1)
    growth = {"into": (n, 1), "hidden": (n, n), "out": (1, n)}
    for name, p in model.items():
        r_out, r_in = growth[name]
        p.grad = torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1]))
        p.grad *= (r_in / r_out) ** 0.5 / p.grad.norm()
    optimizer.first_step()
    total = (1 / n + 1 + n) ** 0.5
    for name, p in model.items():
        r_out, r_in = growth[name]
        found = torch.linalg.matrix_norm(p.detach(), 2)
        # Under the global norm, the norm is that of the largest layer alone only for infinite width.
        share = 1.0 if norm == "tensor" else n**0.5 / total
        torch.testing.assert_close(found, torch.tensor(rho * share * (r_out / r_in) ** 0.5), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("method", [SAM, fused_sam.LayerSAM], ids=lambda m: m.__name__)
@pytest.mark.parametrize("norm", ["global", "group", "tensor"])
def test_fifty_groups_take_the_kernel_calls_of_one(method: type[SAM], norm: str) -> None:
    counts = []
    for groups in (1, 50):
        params = [nn.Parameter(torch.randn(20)) for _ in range(100)]
        split = [{"params": params[k::groups], "rho": 0.01 * (1 + k)} for k in range(groups)]
        optimizer = method(split, norm=norm, lr=0.1, momentum=0.9, backend="cpu")
        counts.append(calls_of(optimizer, params))
    assert counts[0] == counts[1] and sum(counts[0].values()) == 4


def calls_of(optimizer: SAM, params: list[nn.Parameter]) -> dict[str, int]:
    """Return how often a settled step calls each primitive."""
    called: dict[str, int] = {}
    backend = optimizer.stepper.backend

    class Counting(type(backend)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in ("norm", "accumulate_norm", "squares", "perturb", "update", "restore"):
                called[name] = called.get(name, 0) + 1
            return super().__getattribute__(name)

    for settled in (False, True):
        if settled:
            backend.__class__ = Counting
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.randn_like(p)
            half()
    return called


@pytest.mark.skipif(cuda_source.register() is not None, reason="the kernels' source was not built")
@pytest.mark.parametrize("norm", ["group", "tensor"])
def test_a_step_with_norms_per_tensor_takes_five_launches(norm: str) -> None:
    """On a GPU: squares, finish_norm, perturb, norm, update, for any number of tensors and groups in one table."""
    shim = cuda_source.module()
    for count, groups in ((3, 1), (161, 50)):
        params = [nn.Parameter(torch.randn(20)) for _ in range(count)]
        split = [{"params": params[k::groups], "rho": 0.01 * (1 + k)} for k in range(groups)]
        optimizer = fused_sam.LayerSAM(split, norm=norm, lr=0.1, momentum=0.9, backend=cuda_source.NAME)
        for _ in range(2):
            before = shim.launches()
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.ones_like(p)
                half()
        assert shim.launches() - before == 5


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_networks_with_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only one of model and base has the parameter '0\.bias'"):
        mup_rho_groups(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"parameter 'weight' is \(4, 2\) in the model and \(4, 2, 3\) in the base"):
        mup_rho_groups(nn.Linear(2, 4), nn.Conv1d(2, 4, 3))


def test_other_norms_and_radii_are_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='norm must be "tensor" or "global", as the optimizer\'s, not \'group\''):
        mup_rho_groups(net, net, norm="group")
    with pytest.raises(ValueError, match="rho must be at least 0"):
        mup_rho_groups(net, net, rho=-1.0)
