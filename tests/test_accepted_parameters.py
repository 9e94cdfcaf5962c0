"""Weights that torch.optim accepts: lazy ones, frozen ones of any kind, and one weight twice in a group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import nets
from support.family import NEED_ADAM, on_adam
from torch import nn

import fused_sam
from fused_sam import SAM

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


class Quantised(torch.Tensor):
    """A tensor subclass without memory of its own, as quantisation libraries make them."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantised:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].inner)
        raise NotImplementedError(f"{func} touches a quantised weight")


FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False),
    "int8": lambda: nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "float8": lambda: nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False),
    "complex": lambda: nn.Parameter(torch.ones(4, dtype=torch.complex64), requires_grad=False),
    "another device": lambda: nn.Parameter(torch.ones(4, device="meta"), requires_grad=False),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "subclass": lambda: nn.Parameter(Quantised(torch.ones(4)), requires_grad=False),
}


def names() -> list[str]:
    # FlatLoRA needs frozen weights that it can perturb; tests/test_methods_one_pass.py has those that it cannot.
    return [name for name in fused_sam.METHODS if name not in ("MomentumSAM", "FlatLoRA")]


@pytest.mark.parametrize("place", ["first", "last", "its own group"])
@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_weights_do_not_matter(backend: str, kind: str, place: str) -> None:
    model, twin, frozen = nets.net(), nets.net(), FROZEN[kind]()
    weights: list[Any] = list(model.parameters())
    groups: Any = {
        "first": [frozen, *weights],
        "last": [*weights, frozen],
        "its own group": [{"params": weights[:2]}, {"params": [frozen]}, {"params": weights[2:]}],
    }[place]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    other = SAM(twin.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    nets.train(model, optimizer, range(3))
    nets.train(twin, other, range(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert frozen not in optimizer.state and frozen.grad is None
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights) + 1
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys()


@pytest.mark.parametrize("name", names())
def test_every_method_takes_them(name: str) -> None:
    method: Any = fused_sam.METHODS[name]
    if name in NEED_ADAM:
        method = partial(on_adam, method)
    required = {"ESAM": {"gamma": 1.0}, "MicrobatchSAM": {"num_microbatches": 1}, "LESAM": {"total": 3}}
    own = required.get(name, {})
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, **own}
    results = []
    for frozen in ([], [FROZEN["uint8"](), FROZEN["another device"]()]):
        model = nets.net()
        weights: list[Any] = list(model.parameters())
        optimizer = method([*weights[:3], *weights[3:], *frozen], torch.optim.SGD, **options)
        for step in range(3):
            closure = nets.closure_for(model, step)
            optimizer.step(lambda *part: closure())  # noqa: B023
        results.append(weights)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_a_frozen_weight_takes_part_once_it_is_trainable() -> None:
    offloaded: Any = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([offloaded, p], torch.optim.SGD, rho=0.5, lr=0.1)
    p.grad = torch.ones(3)
    optimizer.first_step()
    optimizer.second_step()
    offloaded.data = torch.full((3,), 2.0)  # brought back in a dtype that can be trained
    offloaded.requires_grad_(True)
    offloaded.grad, p.grad = torch.full((3,), 3.0), torch.full((3,), 4.0)
    clean = offloaded.detach().clone()
    optimizer.first_step()
    torch.testing.assert_close(offloaded.detach() - clean, torch.full((3,), 0.5 * 3 / 75**0.5))
    optimizer.second_step()
    torch.testing.assert_close(offloaded.detach(), torch.full((3,), 1.7))


def test_trainable_weights_of_these_kinds_are_refused_by_name() -> None:
    p = nn.Parameter(torch.ones(3))
    for bad, message in (
        (nn.Parameter(torch.ones(3, dtype=torch.complex64)), r"parameter 1 of group 0 .* is torch.complex64"),
        (nn.Parameter(torch.ones(3, device="meta")), "one device"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SAM([FROZEN["uint8"](), bad, p], torch.optim.SGD, lr=0.1)


# ---- lazy layers ----------------------------------------------------------------------------------------------------


def lazy_net() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 5), nn.Tanh(), nn.LazyLinear(3))


def trained_from_lazy(*, built_first: bool, by_closure: bool, base: Any, backend: str) -> nn.Sequential:
    torch.manual_seed(3)
    model = lazy_net()
    options = {"rho": 0.1, "lr": 0.05, "backend": backend}
    optimizer = SAM(model.parameters(), base, **options) if built_first else None
    torch.manual_seed(4)
    with torch.no_grad():
        model(nets.batch(0)[0])
    if optimizer is None:
        optimizer = SAM(model.parameters(), base, **options)
    for step in range(3):
        if by_closure:
            optimizer.step(nets.closure_for(model, step))
        else:
            nets.two_steps(model, optimizer, step)
    return model


@pytest.mark.parametrize("by_closure", [True, False])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_lazy_layers_train_as_layers_that_are_not(backend: str, base: Any, by_closure: bool) -> None:
    lazy = trained_from_lazy(built_first=True, by_closure=by_closure, base=base, backend=backend)
    eager = trained_from_lazy(built_first=False, by_closure=by_closure, base=base, backend=backend)
    for p, q in zip(lazy.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_first_forward_pass_may_be_that_of_the_first_step() -> None:
    for by_closure in (True, False):
        model = lazy_net()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        assert copy.deepcopy(optimizer).state_dict() == optimizer.state_dict()
        optimizer.zero_grad()

        def closure(model: nn.Module = model) -> torch.Tensor:
            loss = model(torch.ones(2, 6)).pow(2).sum()
            loss.backward()
            return loss

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        assert len(optimizer.state) == 6
        assert "momentum_buffer" in optimizer.state[model[0].weight]


def test_errors_name_weights_without_a_shape() -> None:
    model = lazy_net()
    with pytest.raises(TypeError, match=r"parameter 4 of group 0"):
        SAM([*list(model.parameters())[:4], nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)


# ---- duplicates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_weight_twice_in_a_group_is_warned_of_and_counts_once(backend: str, base: Any) -> None:
    results = []
    for times in (1, 2):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))
        named = [("p", p), *[("q", q)] * times]
        if times == 2:
            with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
                optimizer = SAM(named, base, rho=0.1, lr=0.1, backend=backend)
        else:
            optimizer = SAM(named, base, rho=0.1, lr=0.1, backend=backend)
        assert optimizer.param_groups[0]["param_names"] == ["p", "q"]
        for _ in range(2):
            for scale in (1.0, 2.0):
                p.grad, q.grad = torch.full((3,), scale), torch.full((2,), 3 * scale)
                if scale == 1:
                    optimizer.first_step()
            optimizer.second_step()
        results.append((p.detach(), q.detach()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_a_bare_optimizer_with_a_duplicate_loads() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        bare = torch.optim.SGD([p, p, q], lr=0.1, momentum=0.9, foreach=False)
    p.grad, q.grad = torch.ones(3), torch.full((2,), 2.0)
    bare.step()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SAM([p, p, q], lr=0.1, momentum=0.9)
    optimizer.load_state_dict(bare.state_dict())
    for weight in (p, q):
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], bare.state[weight]["momentum_buffer"])
