"""Base optimizers of torch and other packages under SAM: without perturbation, with it, and resumed. docs/bases.md.

Packages that are not installed are skipped, by name. The table on the page must say what is found here.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from support import bases, nets
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers, parameters
from torch import nn
from torch.optim import Optimizer

from fused_sam import SAM

IDS = [str(base) for base in bases.BASES]
ROWS = [bases.documented(row) for row in bases.table_of(bases.PAGE.read_text())]


@pytest.mark.parametrize("base", bases.BASES, ids=IDS)
def test_a_base_takes_its_own_steps_and_resumes_to_the_bit(base: bases.Base) -> None:
    if reason := bases.missing(base):
        pytest.skip(reason)
    words = bases.outcome_words(base)
    assert words in [says for package, names, says in ROWS if package == base.package and base.name in names]
    assert words[0] == "bits" or (base.fused and words[0] == "rounding")
    assert words[1:] == ("bits", "bits")


def test_the_page_names_every_base_once() -> None:
    listed = [(package, name) for package, names, _ in ROWS for name in names]
    assert sorted(listed) == sorted((base.package, base.name) for base in bases.BASES)


def test_torchs_list_is_whole() -> None:
    """Every class of this version of torch is in the table, or refused with a reason that the page gives."""
    classes = {
        name for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }  # fmt: skip
    refused = {"LBFGS", "SparseAdam"}
    assert classes - refused <= {base.name for base in bases.TORCH}
    page = bases.PAGE.read_text()
    assert all(f"`{name}`" in page for name in refused)


# ---- bases that assert the keys of their groups ---------------------------------------------------------------------


class Exact(Optimizer):
    """Like Keller Jordan's MuonWithAuxAdam: `use_muon` per group, exact keys, defaults in the constructor alone."""

    def __init__(self, param_groups: Any) -> None:
        for group in param_groups:
            self.must("use_muon" in group)
            group["lr"] = group.get("lr", 0.1 if group["use_muon"] else 0.2)
            extra = {"momentum"} if group["use_muon"] else {"betas"}
            group.update({name: group.get(name, 0.5) for name in extra})
            group["params"] = sorted(group["params"], key=lambda p: p.numel(), reverse=True)
            self.must(set(group) == {"params", "lr", "use_muon", *extra})
        super().__init__(param_groups, {})

    def must(self, held: bool) -> None:
        """Assert without a message, which pytest would add to an assert of a test."""
        if not held:
            raise AssertionError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, group.get("momentum", 0.9))
                    p.sub_(m, alpha=group["lr"])


def exact_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    matrices, vectors = nets.groups_of(model)
    return [{**vectors, "use_muon": False, **options}, {**matrices, "use_muon": True, "lr": 0.05}]


def test_a_base_that_asserts_its_keys_is_served() -> None:
    model, twin = nets.net(dtype=torch.float64), nets.net(dtype=torch.float64)
    optimizer = SAM(exact_groups(model, rho=0.2, perturb=True), Exact, rho=0.2)
    bare = Exact(exact_groups(twin))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [
        id(p) for group in exact_groups(model) for p in sorted(group["params"], key=lambda p: -p.numel())
    ]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.1], 20, cycle_momentum=False)
    torch.optim.lr_scheduler.OneCycleLR(bare, [0.2, 0.1], 20, cycle_momentum=False)
    for step in range(3):
        nets.two_steps(model, optimizer, step)
        by_hand(twin, bare, 0.2, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # In float64, the two perturbations differ by 1e-16 per step.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.load_state_dict(saved)
        assert [{*group} for group in other.param_groups] == [{*group} for group in optimizer.param_groups]
        assert_same_optimizers(other, optimizer)


def by_hand(model: nn.Module, base: Optimizer, rho: float, step: int) -> None:
    params = parameters(base)
    model.zero_grad()
    nets.loss_of(model, step).backward()
    clean = [p.detach().clone() for p in params]
    norm = torch.stack([p.grad.norm() for p in params]).norm()  # type: ignore[union-attr]
    with torch.no_grad():
        for p in params:
            p.add_(rho / norm * p.grad)  # type: ignore[operator]
    model.zero_grad()
    nets.loss_of(model, step).backward()
    with torch.no_grad():
        for p, w in zip(params, clean, strict=True):
            p.copy_(w)
    base.step()


def test_a_group_that_is_added_to_it_has_its_keys() -> None:
    optimizer = SAM(exact_groups(nets.net()), Exact, rho=0.2)
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True, "lr": 1.0, "momentum": 0.5, "rho": 0.1}
    )
    assert {*optimizer.param_groups[2]} == {*optimizer.param_groups[1]} and optimizer.param_groups[2]["rho"] == 0.1


def test_an_assert_without_words_becomes_an_error_that_names_the_keys() -> None:
    model = nets.net()
    groups = exact_groups(model, weight_decay=0.5)
    for given, listed in (
        (groups, r"group 0: params, use_muon, weight_decay, lr, betas; group 1: params, use_muon, lr"),
        ([*model.parameters()], "group 0: params"),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"Exact refused its parameter groups by an assert.*SAM's: {listed}"):
            SAM(given, Exact, rho=0.2)
        assert_same_bits(model.parameters(), before)
    groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    SAM(groups, Exact, rho=0.2)


def test_an_assert_with_words_is_the_bases_own() -> None:
    class Wordy(Exact):
        def __init__(self, param_groups: Any) -> None:
            raise AssertionError("needs eight GPUs")

    with pytest.raises(AssertionError, match="needs eight GPUs"):
        SAM(nets.net().parameters(), Wordy)


# ---- bases that change their groups ---------------------------------------------------------------------------------


class Halves(torch.optim.SGD):
    """Splits every group into two, in reverse order of the parameters, also a group that is added."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        whole = self.param_groups.pop()
        params = whole["params"][::-1]
        middle = len(params) // 2
        for k, part in enumerate((params[:middle], params[middle:])):
            self.param_groups.append({**whole, "params": part, "lr": whole["lr"] / (k + 1)})


@pytest.mark.parametrize("make", [Halves, functools.partial(Halves, momentum=0.5), lambda g, lr: Halves(g, lr=lr)])
def test_a_base_may_split_groups_and_reorder_them(make: Any) -> None:
    model = nets.net()
    optimizer = SAM([{"params": list(model.named_parameters()), "rho": 0.3}], make, lr=0.5)
    names = [name for name, _ in model.named_parameters()][::-1]
    assert [group["param_names"] for group in optimizer.param_groups] == [names[:3], names[3:]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    extra = [("x", nn.Parameter(torch.ones(2))), ("y", nn.Parameter(torch.ones(3)))]
    optimizer.add_param_group({"params": extra, "perturb": False})
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3, 0.05, 0.05]
    assert [group["perturb"] for group in optimizer.param_groups] == [True, True, False, False]
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3, 1, 1]
    before = [p.detach().clone() for p in model.parameters()]
    nets.two_steps(model, optimizer, 0)
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


class Merges(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__([p for group in params for p in group["params"]], lr=lr)


class Drops(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__([{"params": group["params"][1:]} for group in params], lr=lr)


@pytest.mark.parametrize(("cls", "message"), [(Merges, "joined groups: pass their parameters as one group"),
                                              (Drops, "made an optimizer of other parameters")])  # fmt: skip
def test_a_base_with_other_groups_is_refused_and_the_groups_can_be_used_again(cls: type, message: str) -> None:
    groups = nets.groups_of(nets.net(), rho=0.3)
    with pytest.raises(TypeError, match=message):
        SAM(groups, cls, rho=0.2)
    optimizer = SAM(groups, torch.optim.SGD, rho=0.2, lr=0.1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.3]


class Fussy(torch.optim.SGD):
    """Refuses a second group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            raise ValueError("one group is enough")


def test_an_error_of_the_bases_own_add_param_group_adds_nothing() -> None:
    optimizer = SAM(nets.net().parameters(), Fussy, lr=0.1)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match="one group is enough"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before.assert_unchanged()
    assert len(optimizer.param_groups) == 1
