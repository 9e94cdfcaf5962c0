"""Tests of step(closure): both conventions of closures, fresh and used gradients, the loss, and exceptions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.nets import closure_for, loss_of, net, two_steps
from torch import Tensor, nn

from fused_sam import SAM
from fused_sam.schedule import AdaptiveSchedule, AfterDecay


def both(**options: float) -> tuple[nn.Module, SAM, nn.Module, SAM]:
    """Return two equal models, each with its optimizer."""
    ours, twin = net(), net()
    settings = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, **options}
    return ours, SAM(ours.parameters(), **settings), twin, SAM(twin.parameters(), **settings)  # type: ignore[arg-type]


def test_the_closure_runs_twice_if_there_are_no_fresh_gradients() -> None:
    model, optimizer, twin, other = both()
    runs: list[int] = []
    for step in range(3):  # the gradients of the previous step stay, but they are used and not fresh
        optimizer.step(closure_for(model, step, runs))
        two_steps(twin, other, step)
    assert runs == [0, 0, 1, 1, 2, 2]
    assert_same_bits(model.parameters(), twin.parameters())


def test_the_closure_runs_once_if_there_are_fresh_gradients() -> None:
    model, optimizer, twin, other = both()
    runs: list[int] = []
    for step in range(3):
        optimizer.zero_grad()
        closure_for(model, step)()
        optimizer.step(closure_for(model, step, runs))
        two_steps(twin, other, step)
    assert runs == [0, 1, 2]
    assert_same_bits(model.parameters(), twin.parameters())


def test_the_closure_may_clear_gradients_itself() -> None:
    model, optimizer, twin, other = both()
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        two_steps(twin, other, step)
    assert_same_bits(model.parameters(), twin.parameters())


CLEARINGS: dict[str, Callable[[nn.Module, SAM], None]] = {
    "optimizer to None": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model to None": lambda model, optimizer: model.zero_grad(),
    "model to zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "nothing": lambda model, optimizer: None,
}


@pytest.mark.parametrize("clear", CLEARINGS.values(), ids=CLEARINGS.keys())
@pytest.mark.parametrize("before", ["closure", "two steps", "base step", "skipped step"])
def test_used_gradients_are_never_fresh(clear: Callable[[nn.Module, SAM], None], before: str) -> None:
    model, optimizer, _, _ = both()
    if before == "closure":
        optimizer.step(closure_for(model, 0))
    elif before == "base step":
        closure_for(model, 0)()
        optimizer.step()
    else:
        closure_for(model, 0)()
        optimizer.first_step(zero_grad=True)
        closure_for(model, 0)()
        if before == "skipped step":
            next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
        optimizer.second_step()
    clear(model, optimizer)
    runs: list[int] = []
    optimizer.step(closure_for(model, 1, runs))
    assert runs == [1, 1]


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_cleared_before_any_update_are_not_fresh(set_to_none: bool) -> None:
    """A learning-rate finder or a warm-up may run a backward pass and clear its gradients without a step."""
    model, optimizer, twin, other = both()
    closure_for(model, 5)()
    optimizer.zero_grad(set_to_none=set_to_none)
    runs: list[int] = []
    optimizer.step(closure_for(model, 0, runs))
    two_steps(twin, other, 0)
    assert runs == [0, 0]
    assert_same_bits(model.parameters(), twin.parameters())


def test_gradients_added_to_used_ones_are_fresh() -> None:
    """After zero_grad(set_to_none=False), a new backward pass writes to the used tensor."""
    model, optimizer, twin, other = both()
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        closure_for(model, step)()
        runs: list[int] = []
        optimizer.step(closure_for(model, step, runs))
        assert runs == [step]
        two_steps(twin, other, step)
    assert_same_bits(model.parameters(), twin.parameters())


def test_accumulated_gradients_are_fresh() -> None:
    model, optimizer, _, _ = both()
    for _ in range(2):
        (loss_of(model, 0) / 2).backward()
    runs: list[int] = []
    optimizer.step(closure_for(model, 0, runs))
    assert runs == [0]


def test_used_gradients_are_used_in_copies_too() -> None:
    model, optimizer, _, _ = both()
    optimizer.step(closure_for(model, 0))
    other_model, other = copy.deepcopy((model, optimizer))
    runs: list[int] = []
    other.step(closure_for(other_model, 1, runs))
    assert runs == [1, 1]
    optimizer.step(closure_for(model, 1))
    assert_same_bits(model.parameters(), other_model.parameters())


def test_copies_of_accumulated_gradients_are_used_too() -> None:
    """The version counter of a copied tensor starts at 0."""
    model, optimizer, _, _ = both()
    for _ in range(3):
        (loss_of(model, 0) / 3).backward()
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    runs: list[int] = []
    other.step(closure_for(other_model, 1, runs))
    assert runs == [1, 1]


@pytest.mark.parametrize("frozen", ["even", "odd", "all but the last"])
def test_used_gradients_are_not_fresh_if_other_weights_are_frozen(frozen: str) -> None:
    """The optimizer holds all weights, and only the biases or only the head are trained."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    params = list(model.parameters())
    for i, p in enumerate(params):
        last = i == len(params) - 1
        p.requires_grad_({"even": i % 2 == 1, "odd": i % 2 == 0, "all but the last": last}[frozen])
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        loss: Tensor = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert runs == 4


@pytest.mark.parametrize("fresh", [False, True])
def test_step_returns_the_loss_of_the_first_run(fresh: bool) -> None:
    """With fresh gradients, the only run is at the perturbed weights, and step() returns its loss."""
    model, optimizer, twin, other = both()
    if fresh:
        closure_for(model, 0)()
        closure_for(twin, 0)()
        other.first_step()
    expected = loss_of(twin, 0)
    loss = optimizer.step(closure_for(model, 0))
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("result", [None, 3.5, "anything"])
def test_closure_may_return_anything(result: object) -> None:
    model, optimizer, _, _ = both()

    def closure() -> object:
        loss_of(model, 0).backward()
        return result

    assert optimizer.step(closure) == result  # type: ignore[arg-type]
    assert not optimizer.perturbed


def test_step_returns_none_if_the_first_run_returned_none() -> None:
    model, optimizer, _, _ = both()
    results = iter([None, 2.0])

    def closure() -> float | None:
        loss_of(model, 0).backward()
        return next(results)

    assert optimizer.step(closure) is None


def test_the_closure_runs_with_grad_enabled_under_no_grad() -> None:
    model, optimizer, twin, other = both()
    with torch.no_grad():
        optimizer.step(closure_for(model, 0))
    two_steps(twin, other, 0)
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("error", [ValueError("no luck"), KeyboardInterrupt()], ids=["ValueError", "KeyboardInterrupt"])
@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("after_backward", [False, True])
def test_an_exception_in_a_run_changes_nothing(
    backend: str, error: BaseException, run: int, after_backward: bool
) -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    other = SAM(twin.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    two_steps(model, optimizer, 0)
    two_steps(twin, other, 0)
    before = Snapshot(optimizer)
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        loss = loss_of(model, 1)
        if runs == run and not after_backward:
            raise error
        loss.backward()
        if runs == run:
            raise error
        return loss

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert runs == run
    before.assert_unchanged()
    assert not optimizer.perturbed
    optimizer.zero_grad()
    optimizer.step(closure_for(model, 1))
    two_steps(twin, other, 1)
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("bad_run", [1, 2])
def test_a_non_finite_loss_changes_nothing(backend: str, bad_run: int) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    before = Snapshot(optimizer)
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        loss = loss_of(model, 0) * (float("nan") if runs == bad_run else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.skipped
    before.assert_unchanged()


def test_closure_without_a_backward_pass_is_a_step_without_gradients(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    before = Snapshot(optimizer)
    assert optimizer.step(lambda: 1.0) == 1.0
    before.assert_unchanged()


def test_a_closure_that_calls_first_step_is_an_error_and_changes_nothing() -> None:
    model, optimizer, _, _ = both()
    before = Snapshot(optimizer)

    def closure() -> Tensor:
        loss = loss_of(model, 0)
        loss.backward()
        if optimizer.perturbed:
            optimizer.first_step()
        return loss

    with pytest.raises(RuntimeError, match=r"first_step\(\) was called inside the closure"):
        optimizer.step(closure)
    before.assert_unchanged()


def test_a_model_compiled_by_the_eager_backend(backend: str) -> None:
    """With torch.compile's eager backend, the parameters are the model's own, and its graphs use the written values."""
    model, twin = net(), net()
    compiled = torch.compile(model, backend="eager")
    optimizer = SAM(compiled.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    other = SAM(twin.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for step in range(3):
        optimizer.step(closure_for(compiled, step))
        two_steps(twin, other, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_an_exception_in_the_first_run_leaves_no_decision_behind(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, backend=backend, schedule=AfterDecay(0.5))
    optimizer.step(closure_for(model, 0))

    def fails() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    optimizer.param_groups[0]["lr"] = 0.01
    count: list[int] = []
    optimizer.step(closure_for(model, 1, count))
    assert len(count) == 2


def test_an_exception_in_the_only_run_leaves_no_decision_behind(backend: str) -> None:
    """The present gradients decide that the step does not perturb, so that the closure runs only for the update."""
    model = net()
    schedule = AdaptiveSchedule(100, lambda_1=0.0, lambda_2=0.0)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, backend=backend, schedule=schedule)
    optimizer.step(closure_for(model, 0))
    optimizer.zero_grad()
    (1e-3 * loss_of(model, 1)).backward()  # smaller than the schedule's threshold

    def fails() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    (1e3 * loss_of(model, 1)).backward()  # larger than the threshold
    assert optimizer.needs_second_pass


def test_a_closure_within_unperturbed_is_refused_before_it_runs() -> None:
    model, optimizer, _, _ = both()
    closure_for(model, 0)()
    optimizer.first_step()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    runs: list[int] = []
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match=r"step\(closure\) inside `with optimizer"):
        optimizer.step(closure_for(model, 0, runs))
    assert not runs and optimizer.perturbed
    assert_same_bits([p.grad for p in model.parameters() if p.grad is not None], grads)


def clipped(optimizer: SAM) -> None:
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e-3)


def divided(optimizer: SAM) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad /= 7


def cloned(optimizer: SAM) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.grad.clone()


@pytest.mark.parametrize("write", [clipped, divided, cloned])
def test_gradients_that_are_written_after_the_update_do_not_pass_for_new_ones(
    backend: str, write: Callable[[SAM], None]
) -> None:
    def run(write: Callable[[SAM], None] | None) -> tuple[nn.Module, list[int]]:
        model = net()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
        count: list[int] = []
        for step in range(4):
            optimizer.step(closure_for(model, step, count))
            if write is not None:
                write(optimizer)
        return model, count

    (expected, _), (model, count) = run(None), run(write)
    assert count == [0, 0, 1, 1, 2, 2, 3, 3]
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_backward_pass_before_every_step_takes_the_place_of_the_first_call(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    count: list[int] = []
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step(closure_for(model, step, count))
        clipped(optimizer)
        optimizer.zero_grad()
    assert count == [0, 1, 2, 3]
