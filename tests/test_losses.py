"""Tests of fused_sam.training.losses: each against its formula in float64, in every kind of loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import assert_same_bits, assert_same_optimizers
from support.losses import CASES, Case, backward, cross_entropy, divergence
from support.nets import batch, groups_of, net
from support.oracle import HandwrittenSAM
from torch import Tensor, nn
from torch.amp import GradScaler

import fused_sam
from fused_sam import SAM, MicrobatchSAM, UnnormalisedSAM
from fused_sam.schedule import AdaptiveSchedule, Every
from fused_sam.training import losses, sam_step

STEPS = 10
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
EXACT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums in another order, over ten steps

every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    groups = groups_of(model, lr=0.05, adaptive=True, eta=0.1, rho=0.2)
    groups[0] |= {"rho": 0.4, "weight_decay": 1e-2}
    return groups


def data(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step, torch.float64)
    return x[:31], y[:31]


def both(cls: type[SAM] = SAM, **options: Any) -> tuple[nn.Module, SAM, nn.Module, HandwrittenSAM]:
    """Return a net and its optimizer, and the same net with the formulas' optimizer, in float64 with two groups."""
    model = net(dtype=torch.float64)
    twin = copy.deepcopy(model)
    defaults = {"rho": 0.05, **SGD}
    return (
        model,
        cls(grouped(model), **SGD, **options),
        twin,
        HandwrittenSAM([{**defaults, **group} for group in grouped(twin)]),
    )


def assert_close(model: nn.Module, twin: nn.Module, **limits: float) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **(limits or EXACT))


def formula_step(twin: nn.Module, oracle: HandwrittenSAM, case: Case, step: int, perturbs: bool = True) -> None:
    twin.zero_grad()
    if perturbs:
        first = backward(twin, data(step), case.first)
        oracle.perturb()
        twin.zero_grad()
        backward(twin, data(step), case.second, first)
    else:
        backward(twin, data(step), case.ordinary)
        oracle.saved = {id(p): p.detach().clone() for p in twin.parameters()}
    oracle.update()


# ---- loops ----------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    loss(model, data(step)).backward()
    if optimizer.needs_second_pass:
        optimizer.first_step(zero_grad=True)
        loss(model, data(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def two_steps_always(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    loss(model, data(step)).backward()
    optimizer.first_step(zero_grad=True)
    loss(model, data(step)).backward()
    optimizer.second_step(zero_grad=True)


def accumulated(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    x, y = data(step)
    parts = [(x[:8], y[:8]), (x[8:], y[8:])]

    def both_parts() -> None:
        for part in parts:
            (loss(model, part) * len(part[0]) / len(x)).backward()

    both_parts()
    if optimizer.needs_second_pass:
        optimizer.first_step(zero_grad=True)
        both_parts()
    optimizer.step()
    optimizer.zero_grad()


def with_closure(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(model, data(step))
        value.backward()
        return value

    optimizer.step(closure)


def closure_after_backward(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    optimizer.zero_grad()
    loss(model, data(step)).backward()
    if optimizer.needs_second_pass:
        with_closure(model, optimizer, loss, step)
    else:
        optimizer.step()


def in_one_call(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    sam_step(model, loss, data(step), optimizer)


def in_microbatches(model: nn.Module, optimizer: SAM, loss: Any, step: int) -> None:
    sam_step(model, loss, data(step), optimizer, microbatches=3)


LOOPS: dict[str, Callable[[nn.Module, SAM, Any, int], None]] = {
    loop.__name__: loop
    for loop in (
        by_hand, two_steps_always, accumulated, with_closure, closure_after_backward, in_one_call, in_microbatches,
    )
}  # fmt: skip


@every_loss
@pytest.mark.parametrize("loop", LOOPS)
def test_ten_steps_are_the_formula(case: Case, loop: str) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    for step in range(STEPS):
        LOOPS[loop](model, optimizer, loss, step)
        formula_step(twin, oracle, case, step)
    assert_close(model, twin)


@every_loss
def test_ten_steps_on_every_backend(case: Case, backend: str) -> None:
    model, optimizer, twin, oracle = both(backend=backend)
    loss = case.make(optimizer)
    for step in range(STEPS):
        by_hand(model, optimizer, loss, step)
        formula_step(twin, oracle, case, step)
    assert_close(model, twin)


@every_loss
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_a_schedule_leaves_out_has_the_ordinary_loss(case: Case, loop: str) -> None:
    model, optimizer, twin, oracle = both(schedule=Every(3))
    loss = case.make(optimizer)
    for step in range(7):
        LOOPS[loop](model, optimizer, loss, step)
        formula_step(twin, oracle, case, step, perturbs=step % 3 == 0)
    assert_close(model, twin)


@every_loss
def test_rho_zero_is_the_base_optimizer(case: Case) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    for step in range(4):
        by_hand(model, optimizer, loss, step)
        formula_step(twin, oracle, case, step, perturbs=False)
    assert_close(model, twin)


@every_loss
@pytest.mark.parametrize("way", ["sam_step", "closure"])
def test_every_micro_batch_of_msam_has_its_own_passes(case: Case, way: str) -> None:
    model, optimizer, twin, oracle = both(MicrobatchSAM, num_microbatches=2)
    loss = case.make(optimizer)
    for step in range(STEPS):
        x, y = data(step)
        parts = [(x[:15], y[:15]), (x[15:30], y[15:30])]

        def closure(i: int, parts: Any = parts) -> Tensor:
            value: Tensor = loss(model, parts[i])
            value.backward()
            return value

        if way == "sam_step":
            sam_step(model, loss, None, optimizer, microbatches=parts)
        else:
            optimizer.step(closure)
        sums = [torch.zeros_like(p) for p in twin.parameters()]
        for part in parts:
            twin.zero_grad()
            first = backward(twin, part, case.first)
            oracle.perturb()
            twin.zero_grad()
            backward(twin, part, case.second, first)
            for p, total in zip(twin.parameters(), sums, strict=True):
                assert p.grad is not None
                total += p.grad / 2
                p.data.copy_(oracle.saved[id(p)])
        for p, total in zip(twin.parameters(), sums, strict=True):
            p.grad = total
        oracle.update()
    assert_close(model, twin)


@every_loss
def test_the_values_are_those_of_the_ordinary_loss(case: Case) -> None:
    """Of both passes; the distilled loss has its second term too."""
    model, optimizer, _, _ = both()
    loss = case.make(optimizer)
    ordinary = losses.OutputBiasForgetting.criterion
    x, y = data(0)
    with torch.no_grad():
        at_w = ordinary(loss, model(x), y)
        assert torch.equal(loss(model, (x, y)), at_w)
    first = loss(model, (x, y))
    first.backward()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        at_e = ordinary(loss, model(x), y)
        assert torch.equal(loss(model, (x, y)), at_e)
    second = loss(model, (x, y)).detach()
    assert torch.equal(first.detach(), at_w)
    assert torch.equal(second, at_e) != isinstance(loss, losses.SelfDistillation)
    optimizer.restore()


# ---- mixed precision, resuming --------------------------------------------------------------------------------------


@every_loss
def test_a_changing_loss_scale_does_not_change_the_weights(case: Case) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    for step in range(6):
        sam_step(model, loss, data(step), optimizer, scaler=scaler)
        formula_step(twin, oracle, case, step)
    assert scaler.get_scale() == 2.0**7
    assert_close(model, twin)


@every_loss
def test_an_overflow_skips_the_step(case: Case) -> None:
    model, optimizer, _, _ = both()
    loss = case.make(optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**4)
    sam_step(model, loss, data(0), optimizer, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = data(1)
    assert sam_step(model, loss, (x * torch.inf, y), optimizer, scaler=scaler).skipped
    assert_same_bits(model.parameters(), before)
    assert not sam_step(model, loss, data(2), optimizer, scaler=scaler).skipped


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_losses_of_low_precision_outputs_are_fp32(case: Case, dtype: torch.dtype) -> None:
    """The derivative of 31 samples and confident outputs would lose most of its bits in the outputs' own dtype."""
    model = net()
    twin = copy.deepcopy(model)
    optimizer, other = (SAM(m.parameters(), rho=0.3, **SGD) for m in (model, twin))
    loss = case.make(optimizer)
    for step in range(3):
        x, y = (t.float() if t.is_floating_point() else t for t in data(step))
        result = sam_step(model, loss, (x, y), optimizer, autocast=dtype)
        assert result.loss.dtype is torch.float32
        first = None
        for derivative in (case.first, case.second):
            with torch.autocast("cpu", dtype=dtype):
                outputs = twin(x)
            rows = outputs.tolist()
            outputs.backward(torch.tensor(derivative(rows, y.tolist(), first or rows), dtype=dtype))
            if first is None:
                other.first_step(zero_grad=True)
            first = rows
        other.second_step(zero_grad=True)
    # One step of the outputs' dtype in a few derivatives, where fp32 and float64 round to different sides.
    assert_close(model, twin, rtol=0, atol=2e-4)


@every_loss
def test_a_run_resumes_to_the_bit(case: Case) -> None:
    model, optimizer, _, _ = both(schedule=Every(2))
    loss = case.make(optimizer)
    for step in range(4):
        in_microbatches(model, optimizer, loss, step)
    resumed, again, _, _ = both(schedule=Every(2))
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = case.make(again)
    for step in range(4, 7):
        in_microbatches(model, optimizer, loss, step)
        in_microbatches(resumed, again, fresh, step)
    assert_same_optimizers(optimizer, again)


@pytest.mark.parametrize("name", ["Functional", "SelfDistillation"])
def test_losses_that_keep_the_first_pass_work_with_a_schedule_that_reads_gradients(name: str) -> None:
    model, optimizer, twin, oracle = both(schedule=AdaptiveSchedule(10, lambda_1=0.0, lambda_2=0.0, delta=0.1))
    loss = CASES[name].make(optimizer)
    decided = []
    for step in range(8):
        loss(model, data(step)).backward()
        decided.append(optimizer.needs_second_pass)
        if decided[-1]:
            optimizer.first_step(zero_grad=True)
            loss(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        formula_step(twin, oracle, CASES[name], step, perturbs=decided[-1])
    assert len(set(decided)) == 2
    assert_close(model, twin)


@pytest.mark.parametrize("name", ["GSAM", "ASAM", "FriendlySAM", "GCSAM", "ESAM"])
def test_methods_with_another_loss_in_the_first_pass(name: str) -> None:
    """A method does with OBF's gradients what it does with the gradients of two losses that a loop chooses."""
    options: dict[str, Any] = {"gamma": 1.0, "beta": 0.5} if name == "ESAM" else {}
    model, optimizer, twin, _ = both(fused_sam.METHODS[name], **options)
    other = fused_sam.METHODS[name](grouped(twin), **SGD, **options)
    case = CASES["OBF"]
    loss = case.make(optimizer)
    for step in range(4):
        sam_step(model, loss, data(step), optimizer)
        first = backward(twin, data(step), case.first)
        other.first_step(zero_grad=True)
        backward(twin, data(step), case.second, first)
        other.second_step(zero_grad=True)
    assert_close(model, twin)


# ---- what a loss keeps ----------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("when", ["first pass", "second pass"])
def test_a_step_that_an_exception_ends_leaves_nothing_to_the_next_one(case: Case, when: str) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    x, y = data(5)

    def fails(model: nn.Module, inputs: Tensor) -> Tensor:
        if len(inputs) < 10 and (when == "second pass") == optimizer.perturbed:
            raise KeyError
        outputs: Tensor = model(inputs)
        return outputs

    loss._forward = fails
    for step in range(4):
        with pytest.raises(KeyError):
            sam_step(model, loss, None, optimizer, microbatches=[(x[:16], y[:16]), (x[16:25], y[16:25])])
        sam_step(model, loss, data(step), optimizer)
        formula_step(twin, oracle, case, step)
    assert_close(model, twin)


@every_loss
def test_a_batch_skipped_between_the_passes_leaves_nothing_to_the_next_one(case: Case) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    for step in range(4):
        loss(model, data(step + 20)).backward()
        optimizer.first_step()
        optimizer.restore()
        optimizer.zero_grad()
        by_hand(model, optimizer, loss, step)
        formula_step(twin, oracle, case, step)
    assert_close(model, twin)


@every_loss
def test_losses_for_a_log_do_not_count(case: Case) -> None:
    model, optimizer, twin, oracle = both()
    loss = case.make(optimizer)
    for step in range(3):
        loss(model, data(step + 20))  # without backward()
        with torch.no_grad():
            loss(model, data(step + 20))
        by_hand(model, optimizer, loss, step)
        with torch.no_grad():
            loss(model, data(step + 20))
        formula_step(twin, oracle, case, step)
    assert_close(model, twin)
    assert not loss._first_passes or not loss.keeps_outputs


# ---- SADT as released -----------------------------------------------------------------------------------------------


class Shifted(HandwrittenSAM):
    """Unnormalised SAM: e = rho g."""

    def perturb(self) -> None:
        self.saved = {id(p): p.detach().clone() for _, p in self._each()}
        for group, p in self._each():
            if p.grad is not None:
                p.data += group["rho"] * p.grad


def released_formula(twin: nn.Module, update: Callable[[], None], shift: Callable[[], None], step: int) -> None:
    twin.zero_grad()
    first = backward(twin, data(step), cross_entropy)
    update()
    shift()
    backward(twin, data(step), divergence, first)  # adds to the first gradients
    update()


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("scale", [None, 2.0**4])
def test_ten_steps_of_the_released_recipe(backend: str, microbatches: int, scale: float | None) -> None:
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    groups = [groups_of(m, lr=0.05, rho=0.02) for m in (model, twin)]
    optimizer = UnnormalisedSAM(groups[0], rho=0.05, backend=backend, **SGD)
    oracle = Shifted([{"rho": 0.05, **SGD, **group} for group in groups[1]])
    released = losses.ReleasedSADT(optimizer)
    scaler = None if scale is None else GradScaler("cpu", init_scale=scale, growth_interval=3)

    def update() -> None:
        if not hasattr(oracle, "saved"):
            oracle.saved = {id(p): p.detach().clone() for p in twin.parameters()}
        oracle.update()
        del oracle.saved

    for step in range(STEPS):
        result = released.step(model, data(step), microbatches=microbatches, scaler=scaler)
        released_formula(twin, update, oracle.perturb, step)
        assert result.perturbed_loss is not None and not result.skipped
    assert_close(model, twin)
    assert scaler is None or scaler.get_scale() == 2.0 ** (4 + 2 * STEPS // 3)


def test_the_released_recipe_around_adam() -> None:
    """Around Adam, as the authors train, with torch's own Adam as the oracle."""
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = UnnormalisedSAM(model.parameters(), torch.optim.Adam, rho=1e-3, lr=1e-2)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2, foreach=False)
    saved: list[Tensor] = []

    def shift() -> None:
        saved[:] = [p.detach().clone() for p in twin.parameters()]
        for p in twin.parameters():
            assert p.grad is not None
            p.data += 1e-3 * p.grad

    def update() -> None:
        for p, value in zip(twin.parameters(), saved, strict=bool(saved)):
            p.data.copy_(value)
        saved.clear()
        adam.step()

    for step in range(STEPS):
        losses.ReleasedSADT(optimizer).step(model, data(step))
        released_formula(twin, update, shift, step)
    assert_close(model, twin)


def test_a_schedule_counts_batches_of_the_released_recipe() -> None:
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    optimizer = SAM(model.parameters(), rho=0.3, schedule=Every(2), **SGD)
    other = SAM(twin.parameters(), rho=0.3, **SGD)
    released, plain = losses.ReleasedSADT(optimizer), losses.ReleasedSADT(other)
    for step in range(5):
        perturbs = step % 2 == 0
        result = released.step(model, data(step))
        assert (result.perturbed_loss is not None) == perturbs
        for group in other.param_groups:
            group["rho"] = 0.3 if perturbs else 0.0
        plain.step(twin, data(step))
        assert optimizer.param_groups[0]["sam_step"] == step + 1
    assert_same_bits(model.parameters(), twin.parameters())


def test_the_released_recipe_resumes_and_survives_exceptions() -> None:
    model, optimizer, _, _ = both(schedule=Every(2))
    released = losses.ReleasedSADT(optimizer)
    for step in range(3):
        released.step(model, data(step))
    resumed, again, _, _ = both(schedule=Every(2))
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = losses.ReleasedSADT(again)
    with pytest.raises(ValueError, match="target"):
        fresh.step(resumed, (data(0)[0], data(0)[1][:5]))
    for step in range(3, 6):
        released.step(model, data(step))
        fresh.step(resumed, data(step))
    assert_same_optimizers(optimizer, again)
