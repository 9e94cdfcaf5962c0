"""Mistakes in a training loop, each with one warning that names the remedy, and the right loops beside them without."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.family import METHODS, built, train
from support.nets import closure_for, loss_of, net
from torch import Tensor, nn
from torch.amp import GradScaler

import fused_sam
from fused_sam import SAM, MomentumSAM
from fused_sam.backends.contract import SKIPPED_STEPS
from fused_sam.engine.loop_checks import LOSSES, SKIPPED_IN_A_ROW
from fused_sam.schedule import Every
from fused_sam.training import sam_step

Loop = Callable[[nn.Module, Any, int, float], None]


def own_warnings(run: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """Run and return the warnings of this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [w for w in caught if w.category.__module__.startswith("fused_sam")]


def assert_one(caught: list[warnings.WarningMessage], kind: type[Warning], *words: str) -> None:
    assert [w.category for w in caught] == [kind], [str(w.message) for w in caught]
    assert caught[0].filename == __file__
    for word in words:
        assert word in str(caught[0].message)


# ---- skipped steps ----------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, optimizer: Any, step: int, factor: float) -> None:
    (loss_of(model, step) * factor).backward()
    optimizer.first_step(zero_grad=True)
    (loss_of(model, step) * factor).backward()
    optimizer.second_step(zero_grad=True)


def in_one_pass(model: nn.Module, optimizer: Any, step: int, factor: float) -> None:
    optimizer.zero_grad()
    (loss_of(model, step) * factor).backward()
    optimizer.step()


def second_pass_alone(model: nn.Module, optimizer: Any, step: int, factor: float) -> None:
    loss_of(model, step).backward()
    optimizer.first_step(zero_grad=True)
    (loss_of(model, step) * factor).backward()
    optimizer.second_step(zero_grad=True)


SKIPPING: dict[str, tuple[Loop, Callable[..., Any], dict[str, Any]]] = {
    "SAM": (by_hand, SAM, {}),
    "second pass": (second_pass_alone, SAM, {}),
    "rho 0": (by_hand, SAM, {"rho": 0.0}),
    "rho 0, one pass": (in_one_pass, SAM, {"rho": 0.0}),
    "RMSprop": (by_hand, SAM, {"base_optimizer": torch.optim.RMSprop}),
    "first gradients not checked again": (by_hand, SAM, {"check_update": False}),
    "MomentumSAM": (in_one_pass, MomentumSAM, {"momentum": 0.9}),
}


@pytest.mark.parametrize("case", SKIPPING)
def test_many_skipped_steps_in_a_row_get_one_warning(backend: str, case: str) -> None:
    loop, method, options = SKIPPING[case]
    model = net()
    optimizer = method(model.parameters(), **{"lr": 0.1, "backend": backend, **options})

    def run() -> None:
        for step in range(50):
            loop(model, optimizer, step, math.nan if step >= 5 else 1.0)

    assert_one(own_warnings(run), fused_sam.SkippedStepsWarning, "steps were skipped", "scaler.update()")
    assert optimizer.stepper.status.values[SKIPPED_STEPS] == 44  # of 45, before the last one


def test_a_run_of_skipped_steps_ends_with_a_step_that_is_none(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    bad = [SKIPPED_IN_A_ROW - 1, 1, 2, SKIPPED_IN_A_ROW - 1]

    def run() -> None:
        for step, count in enumerate(bad):
            for _ in range(count):
                by_hand(model, optimizer, step, math.nan)
            by_hand(model, optimizer, step, 1.0)

    assert not own_warnings(run)


@pytest.mark.parametrize("case", ["SAM", "rho 0, one pass", "MomentumSAM"])
@pytest.mark.parametrize("ends_at", [2.0, 0.0])
def test_the_search_of_a_scaler_for_its_scale_gets_no_warning(backend: str, case: str, ends_at: float) -> None:
    loop, method, options = SKIPPING[case]
    model = net()
    optimizer = method(model.parameters(), **{"lr": 0.1, "backend": backend, **options})
    scaler = GradScaler("cpu", init_scale=2.0**16)

    def run() -> None:
        for step in range(60):
            factor = math.inf if scaler.get_scale() > ends_at else 1.0
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step) * factor).backward()
            if loop is by_hand:
                optimizer.first_step(zero_grad=True)
                scaler.scale(loss_of(model, step) * factor).backward()
            scaler.step(optimizer)
            scaler.update()

    caught = own_warnings(run)
    if ends_at:
        assert not caught and not optimizer.step_was_skipped
    else:
        assert_one(caught, fused_sam.SkippedStepsWarning)


# ---- no gradients -----------------------------------------------------------------------------------------------


def test_three_steps_without_any_gradient_get_a_warning(backend: str) -> None:
    model, other = net(), net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    caught = own_warnings(lambda: [by_hand(other, optimizer, step, 1.0) for step in range(20)])  # type: ignore[func-returns-value]
    assert_one(caught, fused_sam.NoGradientWarning, "backward()", "parameters of the model")
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    caught = own_warnings(lambda: [optimizer.step(lambda: loss_of(model, 0)) for _ in range(5)])
    assert_one(caught, fused_sam.NoGradientWarning, "in a closure too")


def test_a_gradient_in_one_of_the_first_steps_is_enough(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)

    def run() -> None:
        for step in range(20):
            optimizer.zero_grad()
            if step == 2:
                loss_of(model, 0).backward()
            optimizer.first_step()
            if step == 2:
                loss_of(model, 0).backward()
            optimizer.second_step()

    assert not own_warnings(run)


# ---- one backward pass instead of two -------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"schedule": Every(2)}], ids=["SAM", "schedule"])
def test_second_step_without_a_second_backward_gets_one_warning(
    backend: str, zero_grad: bool, options: dict[str, Any]
) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend, **options)

    def run() -> None:
        for step in range(8):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if optimizer.needs_second_pass:
                optimizer.first_step(zero_grad=zero_grad)
            optimizer.step()

    words = "restored and not updated" if zero_grad else "plain SGD steps"
    assert_one(own_warnings(run), fused_sam.SecondBackwardWarning, words, "call backward() before second_step()")


@pytest.mark.parametrize("method", METHODS)
def test_right_loops_get_no_warning_and_the_checks_end(method: str) -> None:
    model, optimizer = built(method, "reference")
    assert not own_warnings(lambda: train(model, optimizer, range(12)))
    assert optimizer.stepper.pass_check is None


def test_gradients_made_without_backward_get_no_warning(backend: str) -> None:
    model = net()
    params = list(model.parameters())
    optimizer = SAM(params, lr=0.1, backend=backend)

    def run() -> None:
        for step in range(6):
            for p, g in zip(params, torch.autograd.grad(loss_of(model, step), params), strict=True):
                p.grad = g
            optimizer.first_step()
            optimizer.second_step()

    assert not own_warnings(run)


def test_a_second_pass_through_other_parameters_is_a_second_pass(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)

    def run() -> None:
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.first_step()
            model[4].bias.sum().backward()
            optimizer.second_step()

    assert not own_warnings(run)


# ---- the scale of the update ----------------------------------------------------------------------------------------


def program(kind: str) -> Callable[[nn.Module, SAM, GradScaler, int], None]:
    """Return a step under GradScaler. Those that begin with "right" have the right scale."""

    def step_of(model: nn.Module, optimizer: SAM, scaler: GradScaler, step: int) -> None:
        first = loss_of(model, step)
        (first if "unscaled, " in kind else scaler.scale(first)).backward()
        if "unscale_ first" in kind:
            scaler.unscale_(optimizer)
        optimizer.first_step(zero_grad=True)
        second = loss_of(model, step)
        (second if ", unscaled" in kind else scaler.scale(second)).backward()
        if "unscale_ second" in kind:
            scaler.unscale_(optimizer)
        if "by hand" in kind:
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= scaler.get_scale()
        if "second_step" in kind:
            optimizer.second_step(zero_grad=True)
            if "unscale_" in kind:
                scaler.update()
        else:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step_of


@pytest.mark.parametrize("kind", [
    "scaled, scaled, unscale_ first, second_step",
    "unscaled, scaled, second_step",
    "scaled, scaled, second_step",
])  # fmt: skip
def test_an_update_that_nothing_divides_by_the_scale_gets_one_warning(backend: str, kind: str) -> None:
    model, run = net(), program(kind)
    optimizer = SAM(model.parameters(), lr=1e-9, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    caught = own_warnings(lambda: [run(model, optimizer, scaler, step) for step in range(8)])  # type: ignore[func-returns-value]
    assert_one(caught, fused_sam.GradScaleWarning, "too long by that factor", "scaler.step(optimizer)", "4096")


def test_an_update_that_was_divided_by_a_scale_it_does_not_have_gets_one_warning(backend: str) -> None:
    model, run = net(), program("scaled, unscaled")
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    caught = own_warnings(lambda: [run(model, optimizer, scaler, step) for step in range(8)])  # type: ignore[func-returns-value]
    assert_one(caught, fused_sam.GradScaleWarning, "too short by that factor", "scaler.scale(loss)")


@pytest.mark.parametrize("kind", [
    "right: scaled, scaled",
    "right: scaled, scaled, unscale_ second",
    "right: scaled, scaled, unscale_ second, second_step",
    "right: scaled, scaled, unscale_ first",
    "right: scaled, scaled, by hand, second_step",
    "right: unscaled, unscaled, second_step",
    "right: unscaled, scaled",
])  # fmt: skip
def test_right_programs_under_a_scaler_get_no_warning(backend: str, kind: str) -> None:
    model, run = net(), program(kind)
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.ones(()))
    assert not own_warnings(lambda: [run(model, optimizer, scaler, step) for step in range(8)])  # type: ignore[func-returns-value]
    assert optimizer.stepper.pass_check is None


# ---- a rho that is too large ----------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Its loss is `level`, plus `rise` where its weight is not 0: a model whose perturbed loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.level, self.rise = 1.0, 1.0

    def forward(self) -> Tensor:
        moved = bool((self.weight.detach() != 0).any())
        along = self.weight.sum()
        return self.level + self.rise * moved + along - along.detach()


@pytest.mark.parametrize("by", ["closure", "sam_step"])
@pytest.mark.parametrize(("rise", "falls", "rho_warns"), [(1.0, False, True), (1.0, True, False), (0.2, False, False)])
def test_a_perturbed_loss_far_above_a_loss_that_does_not_fall(
    backend: str, by: str, rise: float, falls: bool, rho_warns: bool
) -> None:
    model = Steep()
    model.rise = rise
    optimizer = SAM(model.parameters(), lr=0.0, rho=0.5, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    def run() -> None:
        for step in range(LOSSES + 5):
            if falls:
                model.level = 1.0 - step / (2 * LOSSES)
            if by == "closure":
                optimizer.step(closure)
            else:
                sam_step(model, lambda m, _: m(), torch.zeros(1), optimizer)

    caught = own_warnings(run)
    if rho_warns:
        assert_one(caught, fused_sam.LargeRhoWarning, "100%", "smaller rho", "fused_sam.schedule.RhoWarmup")
    else:
        assert not caught
    assert optimizer.stepper.loss_check is None


def test_losses_that_are_no_numbers_end_the_check(backend: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)

    def closure() -> Any:
        optimizer.zero_grad()
        closure_for(model, 0)()
        return {"loss": 1.0}

    optimizer.step(closure)
    assert optimizer.stepper.loss_check is None
    optimizer = SAM(model.parameters(), lr=0.1, backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())  # not a fresh network
    assert optimizer.stepper.loss_check is None


# ---- options --------------------------------------------------------------------------------------------------------

MISSPELT = {"weigth_decay": "weight_decay", "Rho": "rho", "adaptve": "adaptive", "weight-decay": "weight_decay",
            "learning_rate": "lr", "pertub": "perturb", "momentun": "momentum", "alhpa": "alpha"}  # fmt: skip
NOTES = ["name", "initial_lr", "max_momentum", "lr_scale", "weight_decay_mult", "layer", "base_momentum", "lr_mult"]


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_option_of_a_group_gets_a_warning_that_names_the_likely_one(key: str, later: bool) -> None:
    model = net()
    weights, others = list(model.parameters())[:1], list(model.parameters())[1:]
    group = {"params": others, key: 0.1}

    def run() -> None:
        if later:
            optimizer = fused_sam.GSAM(weights, lr=0.1, momentum=0.9)
            optimizer.add_param_group(group)
        else:
            optimizer = fused_sam.GSAM([{"params": weights}, group], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2)), key: 0.1})  # warned once

    assert_one(own_warnings(run), fused_sam.OptionWarning, f"{key!r} in group 1", f"probably {MISSPELT[key]!r}")


def test_notes_of_a_program_in_its_groups_get_no_warning() -> None:
    model = net()
    group = {"params": list(model.parameters()), **dict.fromkeys(NOTES, 1)}
    for base in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, fused_sam.Lion):
        assert not own_warnings(lambda base=base: SAM([dict(group)], base, lr=0.1))  # type: ignore[misc]
    assert not own_warnings(lambda: SAM([{**torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]}], lr=0.1))


@pytest.mark.parametrize("where", ["constructor", "group", "later"])
def test_an_adaptive_group_with_the_default_rho_gets_one_warning(where: str) -> None:
    def run() -> SAM:
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        if where == "constructor":
            return SAM([{"params": [p]}, {"params": [q]}], adaptive=True, lr=0.1)
        optimizer = SAM([{"params": [p], "adaptive": where == "group"}], lr=0.1)
        optimizer.add_param_group({"params": [q], "adaptive": True})
        return optimizer

    assert_one(own_warnings(run), fused_sam.OptionWarning, "default rho 0.05", "0.5 to 2")


def test_an_adaptive_group_with_a_rho_of_its_own_gets_no_warning() -> None:
    def run() -> None:
        for options in ({"rho": 0.05}, {"rho": 0.0}, {"rho": 2.0}):
            SAM([nn.Parameter(torch.ones(2))], adaptive=True, lr=0.1, **options)
        SAM([{"params": [nn.Parameter(torch.ones(2))], "rho": 0.1, "adaptive": True}], lr=0.1)
        fused_sam.ASAM([nn.Parameter(torch.ones(2))], lr=0.1)
        MomentumSAM([nn.Parameter(torch.ones(2))], adaptive=True, lr=0.1, momentum=0.9)

    assert not own_warnings(run)
