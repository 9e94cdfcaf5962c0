"""base_options: options of the base optimizer that are named as SAM's are, such as the rho of Adadelta."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from support import nets
from torch import nn
from torch.optim import Optimizer

from fused_sam import SAM, LookSAM
from fused_sam.schedule import Every


class Clashing(Optimizer):
    """Gradient descent whose options are named as SAM's and LookSAM's are, and which counts its steps in one."""

    def __init__(
        self, params: Any, lr: float = 0.1, rho: float = 1.0, eta: float = 2.0, perturb: bool = False,
        adaptive: str = "no", seed: int = 5, backend: str = "mine", max_norm: float = 3.0, schedule: Any = None,
        eps: float = 0.5, k: int = 0,
    ) -> None:  # fmt: skip
        names = ("lr", "rho", "eta", "perturb", "adaptive", "seed", "backend", "max_norm", "schedule", "eps", "k")
        given = locals()
        super().__init__(params, {name: given[name] for name in names})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["eta"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["rho"])


OPTIONS = {
    "rho": 0.25, "eta": 7.0, "perturb": True, "adaptive": "maybe", "seed": -1, "backend": "x", "max_norm": -2.0,
    "schedule": "s", "eps": 9.0, "k": 4,
}  # fmt: skip


def plain(groups: Any, **options: Any) -> torch.Tensor:
    """Return SAM's passes around Clashing in plain torch, for one weight with gradient 2 w and rho 0.5."""
    (p,) = groups[0]["params"]
    optimizer = Clashing(groups, **options)
    for _ in range(3):
        clean = p.detach().clone()
        g = 2 * clean
        p.grad = 2 * (clean + 0.5 * g / g.norm())
        optimizer.step()
    return p.detach()


def train(optimizer: SAM, steps: int = 3) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        for call in (optimizer.first_step, optimizer.second_step):
            p.grad = 2 * p.detach()
            call()


def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, -4.0, 1.0]))


def test_every_option_reaches_the_base(backend: str) -> None:
    p = weight()
    optimizer = SAM([p], Clashing, rho=0.5, seed=11, backend=backend, base_options={**OPTIONS, "lr": 0.05})
    group = optimizer.param_groups[0]
    assert group["base_options"] == {name: OPTIONS[name] for name in ("rho", "eta", "perturb", "adaptive")}
    assert {name: group[name] for name in ("rho", "eta", "perturb", "adaptive")} == {
        "rho": 0.5, "eta": 0.0, "perturb": True, "adaptive": False,
    }  # fmt: skip
    assert {name: group[name] for name in OPTIONS if name not in group["base_options"]}.items() <= OPTIONS.items()
    assert optimizer.backend == backend and optimizer.stepper.settings.eps == 1e-12
    train(optimizer)
    torch.testing.assert_close(p.detach(), plain([{"params": [weight()]}], **{**OPTIONS, "lr": 0.05}))
    assert group["base_options"]["eta"] == 10 and group["eta"] == 0, "the base's own writes stay its own"


def test_without_them_the_base_has_its_defaults_and_keywords_are_sams() -> None:
    optimizer = SAM([weight()], Clashing, rho=0.5, eta=0.3, adaptive=True, seed=3, max_norm=1.5, schedule=Every(1))
    group = optimizer.param_groups[0]
    assert group["base_options"] == {"rho": 1.0, "eta": 2.0, "perturb": False, "adaptive": "no"}
    assert (group["rho"], group["eta"], group["seed"], group["max_norm"]) == (0.5, 0.3, 5, 3.0)
    assert optimizer.defaults["base_options"] == group["base_options"] and optimizer.defaults["rho"] == 0.5
    assert optimizer.stepper.settings.max_norm == 1.5


def test_eps_of_sam_beside_that_of_the_base() -> None:
    one = SAM([weight()], torch.optim.Adam, eps=1e-3)
    assert one.param_groups[0]["eps"] == 1e-3 and one.stepper.settings.eps == 1e-12
    both = SAM([weight()], torch.optim.Adam, eps=1e-3, base_options={"eps": 1e-5})
    assert both.param_groups[0]["eps"] == 1e-5 and both.stepper.settings.eps == 1e-3


def test_methods_options() -> None:
    optimizer = LookSAM([weight()], Clashing, k=3, base_options={"k": 9})
    assert optimizer.k == 3 and optimizer.param_groups[0]["k"] == 9


@pytest.mark.parametrize("later", [False, True])
def test_groups_have_their_own(later: bool) -> None:
    groups = [
        {"params": [weight()], "base_options": {"rho": 0.1, "lr": 0.7}},
        {"params": [weight()], "rho": 0.2, "base_options": {"eta": 8.0}},
        {"params": [weight()]},
    ]
    optimizer = SAM(groups[:1] if later else groups, Clashing, rho=0.5, base_options={"rho": 0.6})
    for group in groups[1:] if later else []:
        optimizer.add_param_group(group)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.2, 0.5]
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.1, 0.1]
    assert [group["base_options"]["rho"] for group in optimizer.param_groups] == [0.1, 0.6, 0.6]
    assert [group["base_options"]["eta"] for group in optimizer.param_groups] == [2.0, 8.0, 2.0]
    optimizer.param_groups[2]["base_options"]["rho"] = 0.9
    assert optimizer.defaults["base_options"]["rho"] == 0.6


def test_adadelta_with_a_rho_per_group_trains_as_plain_torch_and_resumes(backend: str) -> None:
    def groups(model: nn.Module, key: str) -> list[dict[str, object]]:
        first, *rest = model.parameters()
        return [{"params": [first], **({"rho": 0.5} if key == "rho" else {key: {"rho": 0.5}})}, {"params": rest}]

    model, other = nets.net(), nets.net()
    plain_optimizer = torch.optim.Adadelta(groups(model, "rho"), rho=0.8)  # type: ignore[arg-type]
    ours = SAM(groups(other, "base_options"), torch.optim.Adadelta, rho=0.0, base_options={"rho": 0.8}, backend=backend)
    nets.train_plain(model, plain_optimizer, range(4))
    nets.train_plain(other, ours, range(4))
    saved = ours.state_dict()
    ours = SAM(groups(other, "base_options"), torch.optim.Adadelta, rho=0.0, backend=backend)
    ours.load_state_dict(saved)
    assert [group["base_options"]["rho"] for group in ours.param_groups] == [0.5, 0.8]
    nets.train_plain(model, plain_optimizer, range(4, 7))
    nets.train_plain(other, ours, range(4, 7))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_partial_and_a_function() -> None:
    for base in (functools.partial(Clashing, rho=0.3), lambda groups: Clashing(groups, rho=0.3)):
        group = SAM([weight()], base, rho=0.5).param_groups[0]
        assert group["rho"] == 0.5 and group["base_options"]["rho"] == 0.3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_checkpoints_and_copies(copied: Any) -> None:
    optimizer = SAM([weight()], Clashing, rho=0.5, base_options=OPTIONS)
    train(optimizer, 2)
    other = copied(optimizer)
    loaded = SAM([nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())], Clashing)
    loaded.load_state_dict(copied(optimizer.state_dict()))
    assert "eta: 9.0" not in repr(optimizer) and "'eta': 9.0" in repr(optimizer)
    for each in (other, loaded):
        assert {k: v for k, v in each.param_groups[0].items() if k != "params"} == {
            k: v for k, v in optimizer.param_groups[0].items() if k != "params"
        }
    for each in (optimizer, other, loaded):
        train(each, 2)
    for each in (other, loaded):
        assert torch.equal(each.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])
        assert each.param_groups[0]["base_options"]["eta"] == 11


def test_the_bare_bases_checkpoint() -> None:
    """Its rho is its own, and SAM's stays as it is."""
    bare = torch.optim.Adadelta([weight()], lr=0.3, rho=0.7)
    optimizer = SAM([weight()], torch.optim.Adadelta, rho=0.02)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.02 and optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["base_options"] == {"rho": 0.7}


def test_schedulers_write_the_groups_rate() -> None:
    optimizer = SAM([weight()], Clashing, rho=0.5, base_options={"lr": 0.4, "rho": 0.25})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2 and scheduler.get_last_lr() == [0.2]


def test_an_error_in_the_bases_step_leaves_sams_options() -> None:
    class Fails(Clashing):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert self.param_groups[0]["rho"] == 0.25
            raise ValueError("no luck")

    optimizer = SAM([weight()], Fails, rho=0.5, base_options={"rho": 0.25})
    with pytest.raises(ValueError, match="no luck"):
        train(optimizer)
    assert optimizer.param_groups[0]["rho"] == 0.5 and optimizer.param_groups[0]["base_options"]["rho"] == 0.25


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.1, "base_options": {"lr": 0.2}}, TypeError, "lr is set twice, as a keyword and in base_options"),
    ({"base_options": [("lr", 0.2)]}, TypeError, r"base_options must be a dict of option names"),
    ({"base_options": {"rho": 0.9}}, TypeError, "unexpected keyword argument 'rho'"),
    ({"base_options": {1: 0.9}}, TypeError, r"base_options must be a dict of option names"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAM([weight()], torch.optim.SGD, **options)


GROUP_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"base_options": {"rho": 0.9}}, ValueError, "base_options of group 1 set 'rho', which SGD does not have"),
    ({"lr": 0.3, "base_options": {"lr": 0.9}}, ValueError, "base_options of group 1 set lr, which the group itself"),
    ({"base_options": 3}, TypeError, "base_options of group 1 must be a dict of option names"),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("group", "error", "message"), GROUP_ERRORS, ids=range(len(GROUP_ERRORS)))
def test_errors_of_groups(group: dict[str, Any], error: type[Exception], message: str, later: bool) -> None:
    if not later:
        with pytest.raises(error, match=message):
            SAM([{"params": [weight()]}, {"params": [weight()], **group}], torch.optim.SGD, lr=0.1)
        return
    optimizer = SAM([weight()], torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [weight()], **group})
    assert len(optimizer.param_groups) == 1
    train(optimizer)


def test_a_fused_base_trains_by_them_too() -> None:
    model, twin = nets.net(), nets.net()
    optimizer = SAM(model.parameters(), rho=0.1, base_options={"lr": 0.1, "momentum": 0.9})
    other = SAM(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    assert optimizer.stepper.base.rule is not None and "base_options" not in optimizer.param_groups[0]
    nets.train(model, optimizer, range(3))
    nets.train(twin, other, range(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_groups_can_be_used_again_after_an_error() -> None:
    groups = [{"params": [weight()], "rho": 0.2, "perturb": False}, {"params": [weight()], "base_options": {"lr": 0.3}}]
    with pytest.raises(ValueError, match="Invalid momentum"):
        SAM(groups, torch.optim.SGD, momentum=-1)
    optimizer = SAM(groups, torch.optim.SGD)
    assert optimizer.param_groups[0]["rho"] == 0.2 and not optimizer.param_groups[0]["perturb"]
    assert optimizer.param_groups[1]["lr"] == 0.3


def test_sam_inside_sam_is_refused() -> None:
    with pytest.raises(TypeError, match="makes SAM's two passes itself"):
        SAM([weight()], lambda groups: SAM(groups, lr=0.1))
