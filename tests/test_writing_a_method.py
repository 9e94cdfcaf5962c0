"""Tests of methods that users write with the public Step: the example's formula, and the errors of wrong hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_bits
from support.family import STEPS, Problem, assert_weights, model_and_groups, options, sam_steps
from torch import nn

import fused_sam
from examples.methods.vasso import VaSSO
from fused_sam import SAM, Step, option

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


# ---- the method of examples/methods equals its formula --------------------------------------------------------------


@DTYPES
def test_vasso(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2308.11214: e = rho d / ||d||. d is the running average of the ascent gradients."""
    model, groups = model_and_groups(dtype)
    optimizer = VaSSO(groups, theta=0.3, backend=backend, **options())
    sam_steps(model, optimizer)
    p = Problem()
    d = [torch.zeros_like(w) for w in p.w]
    for step in range(STEPS):
        d = [0.7 * m + 0.3 * x for m, x in zip(d, p.gradient(p.w, step), strict=True)]
        p.update(p.gradient(p.perturb(d), step))
    assert_weights(model, p.w)
    for q, m in zip(model.parameters(), d, strict=True):
        torch.testing.assert_close(optimizer.state[q]["direction"].double(), m, rtol=0, atol=2e-6)


# ---- errors of wrong methods, which change no weight and no state --------------------------------------------------


def broken(hook: Callable[[SAM, Step], Any], name: str, **attributes: Any) -> type[SAM]:
    return type("Broken", (SAM,), {name: hook, **attributes})


def other_vector(step: Step) -> Any:
    p = nn.Parameter(torch.ones(2))
    other = SAM([p], lr=0.1)
    p.grad = torch.ones(2)
    return other.stepper.context.grad  # type: ignore[attr-defined]


WRONG: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("ascent", lambda self, step: step.grad, r"Broken.ascent\(\) must return None, not TensorVector", {}),
    ("descent", lambda self, step: 1.0, r"Broken.descent\(\) must return None, not float", {}),
    ("radius", lambda self, step: "long", r"Broken.radius\(\) must return the length of e", {}),
    ("radius", lambda self, step: torch.ones(2), r"Broken.radius\(\) must return the length of e", {}),
    ("ascent", lambda self, step: step.grad.axpby_(1, 1, 3.0), r"axpby_\(\) takes a vector of this step", {}),
    ("ascent", lambda self, step: step.grad.axpby_(1, 1, other_vector(step)) and None, "have 6 and 1 parameters", {}),
    ("ascent", lambda self, step: step.state("m").scale_(2) and None, "which `updated` may change", {}),
    ("descent", lambda self, step: step.weights.scale_(2) and None, "which `updated` may change", {}),
    ("descent", lambda self, step: step.ascent_grad and None, "keeps_ascent_grad = True", {}),
    ("ascent", lambda self, step: step.state("momentum_buffer") and None, "the base optimizer's own state", {}),
    ("ascent", lambda self, step: setattr(step, "update_grad", step.grad), "set in the hook `descent`", {}),
    ("ascent", lambda self, step: step.ascent_norm and None, "not known before `radius`", {}),
]


@pytest.mark.parametrize(("name", "hook", "message", "attributes"), WRONG)
def test_a_wrong_hook_is_an_error_and_changes_nothing(
    backend: str, name: str, hook: Any, message: str, attributes: dict[str, Any]
) -> None:
    model, groups = model_and_groups(torch.float32)
    optimizer = broken(hook, name, **attributes)(groups, backend=backend, **options())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        nets.two_steps(model, optimizer, 0)
    optimizer.restore()
    assert_same_bits(list(model.parameters()), before)
    assert not any(optimizer.state.values()) and not optimizer.perturbed


def test_an_exception_of_a_hook_changes_nothing(backend: str) -> None:
    class Fails(SAM):
        def descent(self, step: Step) -> None:
            raise KeyError("mine")

    model, groups = model_and_groups(torch.float32)
    optimizer = Fails(groups, backend=backend, **options())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(nets.closure_for(model, 0))
    assert_same_bits(list(model.parameters()), before)
    assert not any(optimizer.state.values())


def test_options_are_declared_once() -> None:
    class Mine(SAM):
        OPTIONS = {"strength": option(0.5, low=0, high=2, help="how much"), "fast": option(False)}  # noqa: RUF012

    p = nn.Parameter(torch.ones(2))
    optimizer = Mine([p], strength=1.5, lr=0.1)
    assert (optimizer.strength, optimizer.fast) == (1.5, False)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Mine's option strength must be from 0 to 2, not 3"):
        optimizer.strength = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Mine's option strength"):
        Mine([p], strength=-1, lr=0.1)
    with pytest.raises(TypeError, match="Mine's option fast must be True or False"):
        Mine([p], fast="no", lr=0.1)
    with pytest.raises(TypeError, match="weakness"):
        Mine([p], weakness=1, lr=0.1)
    with pytest.raises(ValueError, match="sets strength, which is one for all groups"):
        Mine([{"params": [p], "strength": 1.0}], lr=0.1)
    assert "strength" in str(Mine.__signature__)  # type: ignore[attr-defined]


def test_a_wrong_declaration_is_an_error_of_the_class_statement() -> None:
    with pytest.raises(TypeError, match=r"Bad.OPTIONS\['strength'\] must be made by fused_sam.option"):
        type("Bad", (SAM,), {"OPTIONS": {"strength": 0.5}})
    with pytest.raises(TypeError, match=r"Bad.OPTIONS\['rho'\] is SAM's own; its default goes into DEFAULTS"):
        type("Bad", (SAM,), {"OPTIONS": {"rho": option(0.5)}})


def test_combinations_are_read_in_any_order(backend: str) -> None:
    """The combinations are a x + b y in any order, and sums with a vector that occurs twice."""

    class Mix(SAM):
        keeps_ascent_grad = True

        def descent(self, step: Step) -> None:
            g_s, g = step.grad, step.ascent_grad
            step.update_grad = 2 * (g - g_s) + g_s * 3 - g / 2  # g_s + 1.5 g

    p = nn.Parameter(torch.zeros(3))
    optimizer = Mix([p], rho=0.1, lr=1.0, backend=backend)
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.first_step()
    p.grad = torch.tensor([3.0, 2.0, 1.0])
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), -torch.tensor([4.5, 5.0, 5.5]))


def test_unscaling_after_the_first_pass_is_an_error(backend: str) -> None:
    """scaler.unscale_() before the update unscales only g_s. That is an error unless first_step() got the scale."""
    for given in (False, True):
        p = nn.Parameter(torch.zeros(2))
        optimizer = fused_sam.WSAM([p], gamma=0.5, decouple=False, rho=0.1, lr=1.0, backend=backend)
        p.grad = torch.tensor([8.0, 16.0])
        optimizer.first_step(grad_scale=8.0 if given else None)
        p.grad = torch.tensor([3.0, 5.0])
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())  # GradScaler sets these after unscale_()
        if not given:
            with pytest.raises(RuntimeError, match=r"unscale_\(\) has unscaled the second ones only"):
                optimizer.second_step()
            assert torch.equal(p, torch.zeros(2))
            continue
        optimizer.second_step()
        torch.testing.assert_close(p.detach(), -torch.tensor([3.0, 5.0]))  # with gamma 0.5, d is g_s


# ---- what hooks read ------------------------------------------------------------------------------------------------


def test_weights_in_updated_are_the_new_ones(backend: str) -> None:
    """After the update, a norm that `descent` has read is computed again."""
    seen: list[float] = []

    class Reads(SAM):
        def descent(self, step: Step) -> None:
            seen.append(float(step.weights.norm()))

        def updated(self, step: Step) -> None:
            seen.append(float(step.weights.norm()))

    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Reads([p], rho=0.0, lr=1.0, backend=backend)
    p.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    assert seen == [5.0, 4.0]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=["fused", "wrapped"])
def test_gradients_in_updated_have_no_loss_scale(backend: str, base: Any) -> None:
    """For a wrapped base optimizer, p.grad is already unscaled in place. It is not divided again."""
    seen: list[float] = []

    class Reads(SAM):
        def updated(self, step: Step) -> None:
            seen.append(float(step.grad.norm()))

    p = nn.Parameter(torch.zeros(2))
    optimizer = Reads([p], base, rho=0.1, lr=0.1, backend=backend)
    for scale in (None, 8.0):
        factor = scale or 1.0
        p.grad = torch.tensor([1.0, 1.0]) * factor
        optimizer.first_step(grad_scale=scale)
        p.grad = torch.tensor([3.0, 4.0]) * factor
        if scale is not None:  # GradScaler sets these
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        optimizer.second_step()
    assert seen == pytest.approx([5.0, 5.0])


def test_options_that_are_whole_numbers() -> None:
    class Counts(SAM):
        OPTIONS = {"any": option(5), "few": option(2, low=1, high=3)}  # noqa: RUF012

    p = nn.Parameter(torch.ones(1))
    assert Counts([p], any=-7, lr=0.1).any == -7  # type: ignore[attr-defined]
    for wrong, error in ((4, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="Counts's option few must be"):
            Counts([p], few=wrong, lr=0.1)


def test_a_method_that_reads_its_own_decision_is_an_error(backend: str) -> None:
    class Asks(SAM):
        def wants_perturbation(self, step: Step) -> bool:
            return step.scheduled

    model = nets.net()
    optimizer = Asks(model.parameters(), lr=0.1, backend=backend)
    nets.loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"Asks.wants_perturbation\(\) asks whether this step perturbs"):
        optimizer.first_step()
    assert not optimizer.perturbed


@DTYPES
def test_a_running_average_in_one_launch(backend: str, dtype: torch.dtype) -> None:
    """lerp_() makes a state an exponential moving average that starts at zero. A skipped step does not change it."""

    class Averages(SAM):
        def updated(self, step: Step) -> None:
            step.state("average").lerp_(step.grad, 0.25)

    model, groups = model_and_groups(dtype)
    optimizer = Averages(groups, backend=backend, **options())
    average = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(nets.closure_for(model, step))
        average = [0.75 * m + 0.25 * p.grad.double() for m, p in zip(average, model.parameters(), strict=True)]  # type: ignore[union-attr]
    for p, m in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(optimizer.state[p]["average"].double(), m, rtol=1e-5, atol=1e-7)
    before = [optimizer.state[p]["average"].clone() for p in model.parameters()]
    optimizer.zero_grad()
    nets.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    nets.loss_of(model, 0).backward()
    next(model.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    optimizer.second_step()
    assert_same_bits([optimizer.state[p]["average"] for p in model.parameters()], before)


# ---- vectors in unusual places --------------------------------------------------------------------------------------


def one_step(optimizer: SAM, params: list[nn.Parameter], first: list[Any], second: list[Any]) -> None:
    """Take a step with these gradients; None for a parameter without one."""
    for grads, half in ((first, optimizer.first_step), (second, optimizer.second_step)):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        half()


def test_a_copy_of_a_sum_with_tensors_missing_anywhere(backend: str) -> None:
    """None counts as zero in both vectors; where the target has no tensor, nothing is written."""
    seen: list[list[float] | None] = []

    class Copies(SAM):
        keeps_ascent_grad = True

        def updated(self, step: Step) -> None:
            step.state("sum").copy_(2.0 * step.grad + 3.0 * step.ascent_grad)

    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = Copies(params, rho=0.1, lr=0.1, backend=backend)
    one_step(optimizer, params, [[1.0, 2.0], [1.0, 1.0], None], [[1.0, 1.0], None, [5.0, 6.0]])
    for p in params:
        state = optimizer.state[p].get("sum")
        seen.append(None if state is None else state.tolist())
    assert seen == [[5.0, 8.0], None, [10.0, 12.0]]


def test_a_state_that_begins_in_a_sum_with_itself(backend: str) -> None:
    class Averages(SAM):
        def updated(self, step: Step) -> None:
            average = step.state("average")
            average.copy_(0.9 * average + 0.1 * step.grad)

    p = nn.Parameter(torch.zeros(2))
    optimizer = Averages([p], rho=0.1, lr=0.1, backend=backend)
    for expected in (0.1, 0.19):
        one_step(optimizer, [p], [[1.0, 1.0]], [[1.0, 1.0]])
        torch.testing.assert_close(optimizer.state[p]["average"], torch.full((2,), expected))


def test_a_group_of_a_state_begins_and_moves_alone(backend: str) -> None:
    class OneGroup(SAM):
        def updated(self, step: Step) -> None:
            step.state("average").group(1).axpby_(0.5, 1.0, step.grad.group(1))

    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = OneGroup([{"params": [p]} for p in params], rho=0.1, lr=0.1, backend=backend)
    for _ in range(2):
        one_step(optimizer, params, [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2)
    assert set(optimizer.state[params[1]]) == {"average"} and "average" not in optimizer.state.get(params[0], {})
    torch.testing.assert_close(optimizer.state[params[1]]["average"], torch.full((2,), 1.5))


def test_a_norm_is_taken_again_after_any_write(backend: str) -> None:
    seen: list[float] = []

    class Reads(SAM):
        def descent(self, step: Step) -> None:
            g = step.grad
            seen.append(float(g.norm()))
            g.group(0).scale_(2.0)
            seen.append(float(g.norm()))
            for _, t in g.items():
                seen.append(float(g.norm()))
                t.mul_(2.0)
            seen.append(float(g.norm()))

    p = nn.Parameter(torch.zeros(2))
    one_step(Reads([p], rho=0.1, lr=0.1, backend=backend), [p], [[1.0, 1.0]], [[3.0, 4.0]])
    assert seen == [5.0, 10.0, 10.0, 20.0]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=["fused", "wrapped"])
def test_the_first_gradient_as_the_update_has_the_updates_scale(backend: str, base: Any) -> None:
    """scaler.unscale_() leaves g scaled; and a wrapped base scales p.grad in place."""
    seen: list[list[float]] = []

    class First(SAM):
        keeps_ascent_grad = True

        def descent(self, step: Step) -> None:
            step.update_grad = step.ascent_grad

        def updated(self, step: Step) -> None:
            copied = step.weights.zeros_like().copy_(step.ascent_grad)
            seen.append([float(copied.norm()), float(step.ascent_grad.norm())])

    ends = []
    for scale, unscaled in ((1.0, False), (8.0, False), (8.0, True)):
        p = nn.Parameter(torch.zeros(2))
        optimizer = First([p], base, rho=0.1, lr=0.1, backend=backend)
        p.grad = torch.tensor([3.0, 4.0]) * scale
        optimizer.first_step(grad_scale=scale)
        p.grad = torch.tensor([1.0, 1.0]) * (1.0 if unscaled else scale)
        if scale != 1.0:
            optimizer.grad_scale = None if unscaled else torch.tensor(scale)
            optimizer.found_inf = torch.zeros(())
        optimizer.second_step()
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert seen == [[5.0, 5.0]] * 3


def test_the_update_can_be_set_again(backend: str) -> None:
    class Twice(SAM):
        keeps_ascent_grad = True

        def descent(self, step: Step) -> None:
            step.update_grad = step.ascent_grad
            step.update_grad = 2.0 * step.update_grad + step.grad

    p = nn.Parameter(torch.zeros(2))
    one_step(Twice([p], rho=0.1, lr=1.0, backend=backend), [p], [[1.0, 2.0]], [[10.0, 20.0]])
    torch.testing.assert_close(p.detach(), -torch.tensor([12.0, 24.0]))


def test_declarations_of_parents_and_mixins_add_up() -> None:
    class Mixin:
        OPTIONS = {"strength": option(0.5, low=0)}  # noqa: RUF012

    class Mine(Mixin, fused_sam.LookSAM):
        DEFAULTS = {"rho": 0.3}  # noqa: RUF012
        GROUP_STATE = {"mine": 0}  # noqa: RUF012
        k = 2

    class Scaled(fused_sam.ASAM):
        DEFAULTS = {"rho": 0.1}  # noqa: RUF012

    p = nn.Parameter(torch.ones(2))
    optimizer = Mine([p], lr=0.1)
    assert (optimizer.strength, optimizer.k, optimizer.alpha) == (0.5, 2, 0.7)  # type: ignore[attr-defined]
    group = optimizer.param_groups[0]
    assert (group["rho"], group["mine"], group["looksam_step"]) == (0.3, 0, 0)
    with pytest.raises(ValueError, match="k must be at least 1"):
        optimizer.k = 0
    group = Scaled([p], lr=0.1).param_groups[0]
    assert (group["rho"], group["adaptive"], group["eta"]) == (0.1, True, 0.01)
    with pytest.raises(AttributeError, match="scale cannot change after construction"):
        Scaled([p], lr=0.1).scale = "all"


def test_a_copy_has_the_modules_that_a_method_holds() -> None:
    class Teaches(SAM):
        def descent(self, step: Step) -> None:
            assert self.teacher is not None  # type: ignore[attr-defined]

    model = nets.net()
    optimizer = Teaches(model.parameters(), lr=0.1)
    optimizer.teacher = nn.Linear(2, 2)  # type: ignore[attr-defined]
    assert isinstance(copy.deepcopy(optimizer).teacher, nn.Linear)  # type: ignore[attr-defined]


def test_a_perturbation_that_fails_gives_the_gradients_back(backend: str) -> None:
    class Fails(SAM):
        keeps_ascent_grad = True

        def radius(self, step: Step) -> float:
            return step.ascent_norm * 0 + self.length  # type: ignore[attr-defined,return-value,no-any-return]

    p = nn.Parameter(torch.zeros(2))
    optimizer = Fails([p], lr=0.1, backend=backend)
    p.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(AttributeError):
        optimizer.first_step()
    assert p.grad is not None and p.grad.tolist() == [3.0, 4.0] and not optimizer.perturbed
    optimizer.length = 0.5  # type: ignore[attr-defined]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.zeros(())
    optimizer.first_step(grad_scale=2.0)  # the scale that was not told before is told now
    p.grad = torch.tensor([2.0, 2.0])
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -0.1))
