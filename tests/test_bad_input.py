"""Each wrong input raises an error that names the mistake and the remedy, and changes no weight and no state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.nets import closure_for, loss_of, net, two_steps
from torch import nn

import fused_sam
from fused_sam import SAM

SGD = torch.optim.SGD


def weight(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,), **options))


@pytest.fixture
def trained(backend: str) -> tuple[nn.Module, SAM]:
    model = net()
    optimizer = SAM(model.named_parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    two_steps(model, optimizer, 0)
    return model, optimizer


NUMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rho": -0.1}, ValueError, r"rho of group 0 must be a finite number of 0 or more, not -0\.1"),
    ({"rho": float("nan")}, ValueError, r"rho of group 0 must be a finite number of 0 or more, not nan"),
    ({"rho": float("inf")}, ValueError, r"rho of group 0 must be a finite number of 0 or more, not inf"),
    ({"rho": "0.1"}, TypeError, r"rho of group 0 must be a number, not '0\.1'"),
    ({"rho": None}, TypeError, r"rho of group 0 must be a number, not None"),
    ({"rho": True}, TypeError, r"rho of group 0 must be a number, not True"),
    ({"rho": torch.ones(2)}, TypeError, r"rho of group 0 must be a number, not tensor"),
    ({"eta": -1}, ValueError, r"eta of group 0 must be a finite number of 0 or more, not -1"),
    ({"eta": float("nan")}, ValueError, r"eta of group 0 must be a finite number of 0 or more, not nan"),
    ({"adaptive": "yes"}, TypeError, r"adaptive of group 0 must be True or False, not 'yes'"),
    ({"eps": -1e-12}, ValueError, r"eps must be a finite number of 0 or more, not -1e-12"),
    ({"eps": float("nan")}, ValueError, r"eps must be a finite number of 0 or more, not nan"),
    ({"eps": "small"}, ValueError, r"eps must be a finite number of 0 or more, not 'small'"),
    ({"lr": -1.0}, ValueError, r"[Ii]nvalid learning rate: -1\.0"),
    ({"momentum": -0.9}, ValueError, r"[Ii]nvalid momentum value: -0\.9"),
    ({"weight_decay": -0.9}, ValueError, r"[Ii]nvalid weight_decay value: -0\.9"),
    ({"nesterov": True}, ValueError, r"Nesterov momentum requires a momentum and zero dampening"),
    ({"learning_rate": 0.1}, TypeError, r"unexpected keyword argument 'learning_rate'"),
]


@pytest.mark.parametrize(("options", "error", "message"), NUMBERS, ids=[str(o) for o, _, _ in NUMBERS])
def test_options_of_the_constructor(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p = weight()
    with pytest.raises(error, match=message):
        SAM([p], SGD, **{"lr": 0.1, **options})
    assert torch.equal(p, torch.ones(3))


def test_numbers_of_other_kinds_are_numbers() -> None:
    for rho in (1, numpy.float32(1), numpy.float64(1), numpy.int64(1), torch.tensor(1.0)):
        p = weight(4)
        optimizer = SAM([p], SGD, rho=rho, lr=0.1)
        p.grad = torch.ones(4)
        optimizer.first_step()
        torch.testing.assert_close(p.detach(), torch.full((4,), 1.5))


@pytest.mark.parametrize("name", ["rho", "eta"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much"])
def test_options_of_a_group_set_later(trained: tuple[nn.Module, SAM], name: str, value: Any) -> None:
    model, optimizer = trained
    before = Snapshot(optimizer)
    good = optimizer.param_groups[0][name]
    for call in (optimizer.first_step, optimizer.step):
        loss_of(model, 1).backward()
        optimizer.param_groups[0][name] = value
        with pytest.raises((ValueError, TypeError), match=f"{name} of group 0 must be a"):
            call()
        optimizer.param_groups[0][name] = good
        optimizer.zero_grad()
        before.assert_unchanged()
        assert not optimizer.perturbed


def test_options_of_a_group_set_out_of_range_between_the_passes(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    before = Snapshot(optimizer)
    loss_of(model, 1).backward()
    optimizer.first_step()
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho of group 0"):
        optimizer.second_step()
    optimizer.param_groups[0]["rho"] = 0.1
    before.assert_unchanged()
    assert not optimizer.perturbed


def test_options_of_an_added_group(trained: tuple[nn.Module, SAM]) -> None:
    _, optimizer = trained
    before = Snapshot(optimizer)
    for options, message in (
        ({"rho": -1.0}, "rho of group 1 must be a finite number of 0 or more"),
        ({"perturb": 3}, "perturb of group 1 must be True or False, not 3"),
        ({"adaptive": None}, "adaptive of group 1 must be True or False, not None"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": [("extra", weight())], **options})
        before.assert_unchanged()
        assert len(optimizer.param_groups) == 1


def test_options_for_all_groups_are_errors_in_a_group() -> None:
    """torch keeps every key of a group. A group's max_norm would appear in param_groups and have no effect."""
    for cls, base, options in (
        (SAM, SGD, {"max_norm": 1.0}),
        (SAM, SGD, {"base_optimizer": SGD}),
        (SAM, SGD, {"eps": 1e-12}),
        (fused_sam.LookSAM, SGD, {"alpha": 0.5}),
        (fused_sam.LookSAM, SGD, {"backend": "cpu"}),
    ):
        message = f"group 0 sets {next(iter(options))}, which is one for all groups: pass it to {cls.__name__} "
        with pytest.raises(ValueError, match=message):
            cls([{"params": [weight()], **options}], base, lr=0.1)
    for cls, base, options in (
        (SAM, torch.optim.Adam, {"eps": 1e-6}),
        (fused_sam.GSAM, torch.optim.RMSprop, {"alpha": 0.9}),  # an option of the base optimizer
        (SAM, SGD, {"lr_scale": 0.5, "name": "head"}),  # keys that the user adds
    ):
        optimizer = cls([{"params": [weight()], **options}], base, lr=0.1)
        assert optimizer.param_groups[0].items() >= options.items()


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'; there are 'auto', 'reference'.*'cpu'"):
        SAM([weight()], SGD, lr=0.1, backend="gpu")
    monkeypatch.setenv("FUSED_SAM_BACKEND", "typo")
    with pytest.raises(ValueError, match=r"unknown backend 'typo'"):
        SAM([weight()], SGD, lr=0.1)
    monkeypatch.setenv("FUSED_SAM_BACKEND", "reference")
    assert SAM([weight()], SGD, lr=0.1).backend == "reference"
    assert SAM([weight()], SGD, lr=0.1, backend="foreach").backend == "foreach"


def test_the_error_of_a_backend_that_cannot_run_here_names_the_reason() -> None:
    missing = {name: why for name, why in fused_sam.backends.available().items() if why is not True}
    for name, why in missing.items():
        assert isinstance(why, str) and len(why) > 20
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: "):
            SAM([weight()], SGD, lr=0.1, backend=name)


def test_available_is_a_mapping_from_name_to_true_or_the_reason() -> None:
    available = fused_sam.backends.available()
    assert available["reference"] is True and available["foreach"] is True
    assert all(state is True or isinstance(state, str) for state in available.values())


BASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: SGD([weight()], lr=0.1), r"base_optimizer is an instance of SGD; pass the class, .*SAM\(params, SGD, lr="),
    (lambda: 0.05, r"base_optimizer must be a torch\.optim\.Optimizer class such as torch\.optim\.SGD, .*not 0\.05"),
    (lambda: nn.Linear, r"base_optimizer must be a torch\.optim\.Optimizer class"),
    (lambda: "SGD", r"base_optimizer must be a torch\.optim\.Optimizer class .*not 'SGD'"),
    (lambda: SAM, r"base_optimizer is SAM, which is SAM itself: pass the optimizer that is to move the weights"),
    (lambda: fused_sam.LookSAM, r"base_optimizer is LookSAM, which is SAM itself"),
    (lambda: lambda groups, lr: None, r"returned NoneType, not a torch\.optim\.Optimizer"),
    (lambda: lambda groups, lr: SGD([weight()], lr=lr), r"made an optimizer of other parameters"),
    (lambda: functools.partial(torch.optim.LBFGS), r"LBFGS\.step needs a closure of its own"),
    (lambda: torch.optim.LBFGS, r"LBFGS\.step needs a closure of its own and cannot be SAM's base optimizer"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "message"), BASES, ids=range(len(BASES)))
def test_base_optimizer_of_the_wrong_kind(base: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SAM([weight()], base(), lr=0.1)


def integers_with_a_gradient() -> torch.Tensor:
    """Without a gradient they are frozen weights, which no step concerns."""
    t = torch.ones(3, dtype=torch.int64)
    t.grad = torch.ones(3, dtype=torch.int64)
    return t


PARAMETERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (list, ValueError, "empty parameter list"),
    (lambda: weight(), TypeError, "iterable of Tensors or dicts"),
    (lambda: [1.0], TypeError, "can only optimize Tensors"),
    (lambda: [weight() * 2], ValueError, "non-leaf"),
    (lambda: [{"params": {weight()}}], TypeError, "ordered collections"),
    (lambda: [weight(dtype=torch.complex64)], TypeError,
     r"parameter 0 of group 0 .* is torch\.complex64, .* pairs of reals"),
    (lambda: [("w", weight(dtype=torch.complex128))], TypeError,
     r"parameter 'w' \(shape \(3,\)\) is torch\.complex128, .*view_as_complex"),
    (lambda: [nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))], TypeError,
     r"parameter 0 of group 0 .* is torch\.float8_e4m3fn, .* leave it out, as in .* if p\.requires_grad"),
    (lambda: [integers_with_a_gradient()], TypeError,
     r"parameter 0 of group 0 .* is torch\.int64, .* leave it out"),
    (lambda: [weight(), weight(device="meta")], ValueError,
     r"parameters of one device, but got parameter 0 .* on cpu, parameter 1 .* on meta: use one optimizer per device"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "error", "message"), PARAMETERS, ids=range(len(PARAMETERS)))
def test_parameters_of_the_wrong_kind(params: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAM(params(), SGD, lr=0.1)


def test_duplicate_parameters() -> None:
    p = weight()
    with pytest.raises(ValueError, match=r"some parameters appear in more than one parameter group"):
        SAM([{"params": [p]}, {"params": [p]}], SGD, lr=0.1)
    optimizer = SAM([p], SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_share_memory() -> None:
    p = weight(8)
    for q in (nn.Parameter(p.data), nn.Parameter(p.data[4:]), nn.Parameter(p.data.view(2, 4))):
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* and parameter 1 of group 0 .* share memory"):
            SAM([p, q], SGD, lr=0.1)
    SAM([nn.Parameter(p.data[:4]), nn.Parameter(p.data[4:])], SGD, lr=0.1)  # neighbours in one storage are allowed
    matrix = torch.ones(4, 4)
    SAM([nn.Parameter(matrix[:, 0]), nn.Parameter(matrix[:, 1])], SGD, lr=0.1)  # columns of one matrix are allowed


def test_an_error_in_add_param_group_leaves_the_optimizer_usable(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    before = Snapshot(optimizer)
    for bad in (weight(device="meta"), weight(dtype=torch.complex64), nn.Parameter(next(model.parameters()).data)):
        with pytest.raises((ValueError, TypeError), match=r"'extra'|one device"):
            optimizer.add_param_group({"params": [("extra", bad)]})
        before.assert_unchanged()
        assert len(optimizer.param_groups) == 1
    two_steps(model, optimizer, 1)


@pytest.mark.parametrize("when", ["first_step", "second_step", "step", "closure", "closure, second run"])
def test_sparse_gradient(backend: str, when: str) -> None:
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = SAM([("table.weight", table.weight)], SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    before = Snapshot(optimizer)
    runs = 0

    def dense() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = table.weight.square().sum()
        loss.backward()
        return loss

    def sparse() -> torch.Tensor:
        nonlocal runs
        runs += 1
        if when == "closure, second run" and runs == 1:
            return dense()
        loss: torch.Tensor = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    message = r"parameter 'table\.weight' \(shape \(10, 3\)\) has a sparse gradient.*sparse=False"
    if when == "second_step":
        dense()
        optimizer.first_step(zero_grad=True)
    if not when.startswith("closure"):
        sparse()
    call = functools.partial(optimizer.step, sparse) if when.startswith("closure") else getattr(optimizer, when)
    with pytest.raises(RuntimeError, match=message):
        call()
    before.assert_unchanged()
    assert not optimizer.perturbed
    optimizer.zero_grad()
    dense()
    optimizer.step()


def test_a_sparse_gradient_before_a_closure(trained: tuple[nn.Module, SAM]) -> None:
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = SAM(table.parameters(), SGD, rho=0.1, lr=0.1)
    for _ in range(2):
        table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step(lambda: None)


def test_second_step_without_first_step(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    before = Snapshot(optimizer)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called without first_step\(\): .*not perturbed"):
        optimizer.second_step()
    before.assert_unchanged()


def test_second_step_twice(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    two_steps(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"without first_step\(\)"):
        optimizer.second_step()


def test_a_loop_may_skip_a_batch_after_first_step(trained: tuple[nn.Module, SAM]) -> None:
    """The next first_step() restores the weights, perturbs them again, and warns once."""
    model, optimizer = trained
    before = Snapshot(optimizer)
    loss_of(model, 1).backward()
    optimizer.first_step()
    once = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(fused_sam.AbandonedStepWarning, match=r"the step before it was not finished.*call restore\(\)"):
        optimizer.first_step()  # with the same gradients
    assert_same_bits(model.parameters(), once)
    assert optimizer.perturbed
    optimizer.first_step()  # no second warning
    optimizer.restore()
    before.assert_unchanged()


def test_microbatches_of_a_skipped_batch_need_restore(backend: str) -> None:
    """p.grad is a sum there: a new batch's gradient cannot be separated from it."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = fused_sam.MicrobatchSAM([p], num_microbatches=2, rho=0.1, lr=1.0, backend=backend)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.first_step()
    p.grad = torch.tensor([1.0, 1.0])
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called twice: .*call restore\(\) there"):
        optimizer.first_step()
    optimizer.restore()
    assert torch.equal(p, torch.zeros(2)) and not optimizer.perturbed


def test_closure_while_perturbed(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    before = Snapshot(optimizer)
    loss_of(model, 1).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\) was called with perturbed weights: .*restore\(\)"):
        optimizer.step(closure_for(model, 1))
    optimizer.restore()
    before.assert_unchanged()


def test_a_closure_that_is_no_function(trained: tuple[nn.Module, SAM]) -> None:
    model, optimizer = trained
    loss = loss_of(model, 1)
    loss.backward()
    before = Snapshot(optimizer)
    with pytest.raises(TypeError):
        optimizer.step(loss)
    before.assert_unchanged()
    assert not optimizer.perturbed


def truncated(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    return state


def reshaped(state: dict[str, Any]) -> dict[str, Any]:
    state["state"][0]["momentum_buffer"] = torch.ones(2, 2)
    return state


LOADS: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda s: None, TypeError, r"takes an optimizer's state_dict, not NoneType"),
    (lambda s: [s], TypeError, r"takes an optimizer's state_dict, not list"),
    (lambda s: "checkpoint.pt", TypeError, r"takes an optimizer's state_dict, not str"),
    (lambda s: net().state_dict(), ValueError, r"not an optimizer's state_dict: .*was a model's state_dict passed\?"),
    (lambda s: {"optimizer": s}, ValueError, r"it has no 'state' and no 'param_groups', but \['optimizer'\]"),
    (lambda s: {"state": s["state"]}, ValueError, r"it has no 'param_groups'"),
    (lambda s: {**s, "param_groups": s["param_groups"] * 2}, ValueError, r"has 2 parameter groups, the optimizer 1"),
    (truncated, ValueError, r"group 0 of the state_dict has 5 parameters, that of the optimizer 6"),
    (reshaped, ValueError, r"'momentum_buffer' of parameter 0 is \(2, 2\), the parameter \(16, 6\)"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), LOADS, ids=range(len(LOADS)))
def test_loading_something_other_than_a_state_dict(
    trained: tuple[nn.Module, SAM], spoil: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    model, optimizer = trained
    saved = optimizer.state_dict()
    own = {
        "state": {k: dict(v) for k, v in saved["state"].items()},
        "param_groups": [dict(g) for g in saved["param_groups"]],
    }
    before = Snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(spoil(own))
    before.assert_unchanged()
    two_steps(model, optimizer, 1)


@pytest.mark.parametrize("name", ["rho", "eta", "perturb", "adaptive"])
def test_load_of_options_out_of_range(trained: tuple[nn.Module, SAM], name: str) -> None:
    _, optimizer = trained
    saved = optimizer.state_dict()
    saved["param_groups"] = [{**g, name: -1.0} for g in saved["param_groups"]]
    before = Snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=f"{name} of group 0 must be"):
        optimizer.load_state_dict(saved)
    before.assert_unchanged()


def test_state_dict_of_another_optimizer_class(trained: tuple[nn.Module, SAM]) -> None:
    """Adam's groups have no momentum. Loading raises the error, not the next step."""
    _, optimizer = trained
    adam = torch.optim.Adam(net().parameters())
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"momentum"):
        optimizer.load_state_dict(adam.state_dict())
    before.assert_unchanged()


def test_a_gradient_older_than_a_change_of_shape(backend: str) -> None:
    p = weight(4)
    optimizer = SAM([("w", p)], SGD, rho=0.1, lr=0.1, backend=backend)
    p.grad = torch.ones(4)
    p.data = torch.ones(6)
    with pytest.raises(RuntimeError, match=r"parameter 'w' .* is \(6,\) .*its gradient \(4,\).*zero the gradients"):
        optimizer.first_step()
    assert torch.equal(p, torch.ones(6)) and not optimizer.perturbed
    p.grad = torch.ones(6)
    optimizer.first_step()
    optimizer.second_step()


def test_gradient_of_another_shape_after_checked_steps(backend: str) -> None:
    """A weight changes its shape and keeps its old gradient. No kernel may read past the gradient's end."""
    p = weight(4)
    optimizer = SAM([p], SGD, rho=0.1, lr=0.1, backend=backend)
    p.grad = torch.ones(4)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
    p.data = torch.ones(6000)
    with pytest.raises(RuntimeError, match=r"its gradient \(4,\)"):
        optimizer.first_step()
    assert torch.equal(p, torch.ones(6000))
