"""Tests of base optimizers that are not fused. Perturbation and undo are fused around their own step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.nets import closure_for, groups_of, loss_of, net, two_steps
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_sam import SAM

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "foreach": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.99)}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2}),
    "RAdam": (torch.optim.RAdam, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 1e-2}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "ASGD": (torch.optim.ASGD, {"lr": 1e-2}),
}


def by_hand(model: torch.nn.Module, base: Optimizer, rho: float, step: int) -> None:
    """Take a step of SAM around a plain optimizer, weight by weight."""
    params = list(model.parameters())
    base.zero_grad()
    loss_of(model, step).backward()
    saved = [p.detach().clone() for p in params]
    norm = sum(float(p.grad.double().square().sum()) for p in params) ** 0.5  # type: ignore[union-attr]
    with torch.no_grad():
        for p in params:
            p.add_(rho / norm * p.grad)  # type: ignore[operator]
    base.zero_grad()
    loss_of(model, step).backward()
    with torch.no_grad():
        for p, w in zip(params, saved, strict=True):
            p.copy_(w)
    base.step()


@pytest.mark.parametrize(("cls", "options"), BASES.values(), ids=BASES.keys())
def test_equals_a_loop_written_by_hand(backend: str, cls: type[Optimizer], options: dict[str, Any]) -> None:
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), cls, rho=0.1, backend=backend, **options)
    base = cls(twin.parameters(), **options)
    for step in range(5):
        two_steps(model, optimizer, step)
        by_hand(twin, base, 0.1, step)
    # In float64, the two perturbations differ by 1e-16 per step.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
        assert optimizer.state[p].keys() == base.state[q].keys()


def test_rho_zero_is_the_base_optimizer_bit_for_bit(backend: str) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), torch.optim.RAdam, rho=0.0, lr=1e-2, backend=backend)
    base = torch.optim.RAdam(twin.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.step(closure_for(model, step))
        base.zero_grad()
        base.step(closure_for(twin, step))
    assert_same_bits(model.parameters(), twin.parameters())


def test_adagrad_keeps_the_state_of_its_constructor(backend: str) -> None:
    """Adagrad fills its state in the constructor."""
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), torch.optim.Adagrad, rho=0.1, lr=0.1, backend=backend)
    base = torch.optim.Adagrad(twin.parameters(), lr=0.1)
    assert all("sum" in optimizer.state[p] for p in model.parameters())
    for step in range(5):
        two_steps(model, optimizer, step)
        by_hand(twin, base, 0.1, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_non_finite_gradient_changes_neither_weights_nor_state(backend: str, half: str, steps_before: int) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.1, lr=1e-2, backend=backend)
    for step in range(steps_before):
        two_steps(model, optimizer, step)
    before = Snapshot(optimizer)
    for this in ("first", "second"):
        loss_of(model, 9).backward()
        if this == half:
            next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
        getattr(optimizer, f"{this}_step")(zero_grad=True)
    before.assert_unchanged()
    assert optimizer.skipped
    two_steps(model, optimizer, 9)
    assert not optimizer.skipped


def test_groups_and_schedulers_reach_the_base_optimizer(backend: str) -> None:
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = SAM(groups_of(model, lr=1e-3, weight_decay=0.0), torch.optim.AdamW, rho=0.1, lr=1e-2, backend=backend)
    base = torch.optim.AdamW(groups_of(twin, lr=1e-3, weight_decay=0.0), lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1) for o in (optimizer, base)]
    for step in range(5):
        two_steps(model, optimizer, step)
        by_hand(twin, base, 0.1, step)
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_state_dict_is_the_base_optimizers_and_a_resume_is_bit_equal(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, backend=backend)
    for step in range(3):
        two_steps(model, optimizer, step)
    saved = copy.deepcopy(optimizer.state_dict())
    bare = torch.optim.AdamW(net().parameters(), lr=1e-2)
    bare.load_state_dict(saved)
    twin = net(seed=3)
    twin.load_state_dict(model.state_dict())
    other = SAM(twin.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, backend=backend)
    other.load_state_dict(saved)
    for step in range(3, 6):
        two_steps(model, optimizer, step)
        two_steps(twin, other, step)
    assert_same_bits(model.parameters(), twin.parameters())


def test_state_of_other_shapes_than_the_weights_is_loaded(backend: str) -> None:
    """Adafactor keeps a row and a column per matrix."""
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), torch.optim.Adafactor, rho=0.1, lr=1e-2, backend=backend)
    two_steps(model, optimizer, 0)
    twin.load_state_dict(model.state_dict())
    other = SAM(twin.parameters(), torch.optim.Adafactor, rho=0.1, lr=1e-2, backend=backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    two_steps(model, optimizer, 1)
    two_steps(twin, other, 1)
    assert_same_bits(model.parameters(), twin.parameters())


def test_deepcopy_continues_bit_equal(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.1, lr=1e-2, backend=backend)
    two_steps(model, optimizer, 0)
    twin, other = copy.deepcopy((model, optimizer))
    two_steps(model, optimizer, 1)
    two_steps(twin, other, 1)
    assert_same_bits(model.parameters(), twin.parameters())


def test_add_param_group_reaches_the_base_optimizer(backend: str) -> None:
    model = net()
    layers = list(model.parameters())
    optimizer = SAM(layers[:4], torch.optim.Adam, rho=0.1, lr=1e-2, backend=backend)
    two_steps(model, optimizer, 0)
    optimizer.add_param_group({"params": layers[4:], "lr": 1e-3})
    before = [p.detach().clone() for p in layers]
    two_steps(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(layers, before, strict=True))
    assert all(optimizer.state[p] for p in layers)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["for-loop", "fused"])
def test_hooks_run_once_and_get_the_sam_optimizer(backend: str, options: dict[str, Any]) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.1, lr=1e-2, backend=backend, **options)
    seen: list[Any] = []
    handles = [
        optimizer.register_step_post_hook(lambda o, a, k: seen.append(o)),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append(o)),
    ]
    try:
        two_steps(model, optimizer, 0)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 and all(o is optimizer for o in seen)


class Signs(Optimizer):
    """A user's optimizer, whose step() has an additional keyword."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None, *, twice: bool = False) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    p.sub_(group["lr"] * p.grad.sign())


def test_a_users_own_optimizer(backend: str) -> None:
    p: Tensor = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Signs, rho=0.1, lr=0.25, backend=backend)
    for _ in range(2):
        p.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.first_step()
        optimizer.second_step()
    assert torch.equal(p, torch.tensor([0.5, 1.5, 0.5]))
    assert optimizer.state[p] == {"count": 2}


class Momentum(torch.optim.SGD):
    """A subclass of SGD with its own step(). SAM wraps it and does not fuse it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(2)
        return super().step(closure)


def test_subclass_of_sgd_keeps_its_own_step(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Momentum, rho=0.1, lr=0.25, backend=backend)
    p.grad = torch.ones(3)
    optimizer.first_step()
    p.grad = torch.ones(3)
    optimizer.second_step()
    assert torch.equal(p, torch.full((3,), 0.5))


def test_hooks_of_a_subclass_calling_super_run_once(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Momentum, rho=0.1, lr=0.25, backend=backend)
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda o, a, k: seen.append(o))
    try:
        p.grad = torch.ones(3)
        optimizer.step()
    finally:
        handle.remove()
    assert optimizer in seen


def test_error_in_the_base_step_restores_the_weights(backend: str) -> None:
    class Fails(Signs):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise ValueError("no luck")

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Fails, rho=0.5, backend=backend)
    p.grad = torch.ones(3)
    optimizer.first_step()
    with pytest.raises(ValueError, match="no luck"):
        optimizer.second_step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.perturbed


def test_eps_belongs_to_a_base_optimizer_that_has_one() -> None:
    """The public package passes every further keyword to the base optimizer, too."""
    optimizer = SAM([nn.Parameter(torch.ones(3))], torch.optim.Adam, lr=0.1, eps=1e-3)
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert "eps" not in SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, eps=1e-3).param_groups[0]


def test_clipping_without_gradients(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.RMSprop, rho=0.1, lr=0.1, max_norm=1.0, backend=backend)
    before = Snapshot(optimizer)
    optimizer.first_step()
    optimizer.second_step()
    before.assert_unchanged()
    assert not optimizer.step_was_skipped


class Averaging(torch.optim.SGD):
    """Like schedule-free optimizers, eval() replaces the weights by their average, and train() restores them."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.detach(), 0.5)

    def eval(self) -> None:
        self._exchange("weight", "average")

    def train(self) -> None:
        self._exchange("average", "weight")

    @torch.no_grad()
    def _exchange(self, here: str, there: str) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p][here] = p.detach().clone()
                p.copy_(self.state[p][there])


def test_train_and_eval_of_the_base_optimizer(backend: str) -> None:
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), Averaging, rho=0.1, backend=backend, lr=0.1)
    base = Averaging(twin.parameters(), lr=0.1)
    for step in range(4):
        if step == 2:
            model, optimizer = copy.deepcopy((model, optimizer))
        two_steps(model, optimizer, step)
        by_hand(twin, base, 0.1, step)
        clean = [p.detach().clone() for p in model.parameters()]
        optimizer.eval()  # type: ignore[attr-defined]
        base.eval()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)  # float64 rounding, as above
        optimizer.train()  # type: ignore[attr-defined]
        base.train()
        assert_same_bits(model.parameters(), clean)
    loss_of(model, 0).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"eval\(\) was called between first_step\(\) and second_step\(\)"):
        optimizer.eval()  # type: ignore[attr-defined]
    assert not hasattr(SAM(net().parameters(), torch.optim.RMSprop), "train")
