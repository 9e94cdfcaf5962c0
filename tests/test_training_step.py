"""sam_step() equals loops written out, with accumulation, low precision, selection, skips and exceptions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers, same_bits
from support.nets import batch, net
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

import fused_sam
from fused_sam import SAM
from fused_sam.schedule import Every
from fused_sam.training import frozen_batch_norm, sam_step, select_sharp

OPTIONS: dict[str, Any] = {"rho": 0.3, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


class Selecting(SAM):
    """SAM with data selection, like ESAM's."""

    selected_fraction: float | None = 0.4


class OnePass(SAM):
    """SAM that never perturbs, as with some schedules."""

    needs_second_pass = False


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def regular_net() -> nn.Sequential:
    """Return a net with batch norm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def pair(
    make: Callable[[], nn.Module] = net, cls: type[SAM] = SAM, **options: Any
) -> tuple[nn.Module, SAM, nn.Module, SAM]:
    model = make()
    twin = copy.deepcopy(model)
    options = {**OPTIONS, **options}
    return model, cls(model.parameters(), **options), twin, SAM(twin.parameters(), **options)


@pytest.mark.parametrize("loss_fn", [mean_loss, sample_losses])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_is_the_loop_written_out(loss_fn: Any, cls: Any) -> None:
    if cls is torch.optim.Adam:
        model, twin = regular_net(), regular_net()
        optimizer, other = (SAM(m.parameters(), cls, rho=0.3, lr=0.01) for m in (model, twin))
    else:
        model, optimizer, twin, other = pair(regular_net)
    for step in range(4):
        torch.manual_seed(step)
        result = sam_step(model, loss_fn, batch(step), optimizer)
        after = torch.get_rng_state()

        torch.manual_seed(step)
        loss = mean_loss(twin, batch(step))
        expected_after = torch.get_rng_state()
        loss.backward()
        other.first_step(zero_grad=True)
        torch.manual_seed(step)
        with frozen_batch_norm(twin):
            second = mean_loss(twin, batch(step))
        second.backward()
        other.second_step(zero_grad=True)

        assert torch.equal(after, expected_after)
        assert result.perturbed_loss is not None and not result.skipped
        # The mean of a batch's losses and the loss of reduction="mean" may differ by the last bit.
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(result.perturbed_loss, second.detach(), rtol=1e-6, atol=0)
        assert not result.loss.requires_grad and not result.perturbed_loss.requires_grad
    if loss_fn is mean_loss:
        assert_same_optimizers(optimizer, other)
        assert_same_bits(model.buffers(), twin.buffers())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # four steps amplify that last bit


@pytest.mark.parametrize("on", [True, False])
def test_each_pass_may_have_its_own_statistics_and_masks(on: bool) -> None:
    model, optimizer, _, _ = pair(regular_net)
    masks: list[Tensor] = []
    model[3].register_forward_hook(lambda _m, x, y: masks.append((x[0] != 0) & (y == 0)))  # type: ignore[index, operator]
    # If weights hardly move, ReLU's zeros stay, so that the masks can be compared.
    optimizer.param_groups[0]["rho"] = 1e-9
    sam_step(model, mean_loss, batch(0), optimizer, freeze_batch_norm=on, replay_rng=on)
    assert model[1].num_batches_tracked == (1 if on else 2)  # type: ignore[index]
    assert torch.equal(*masks) == on


@pytest.mark.parametrize("microbatches", [3, 32])
@pytest.mark.parametrize("given", ["number", "iterable"])
@pytest.mark.parametrize("loss_fn", [mean_loss, sample_losses])
def test_accumulated_micro_batches_equal_the_whole_batch(microbatches: int, given: str, loss_fn: Any) -> None:
    model, optimizer, twin, other = pair(lambda: net(dtype=torch.float64))
    for step in range(4):
        x, y = batch(step, torch.float64)
        if given == "number":
            result = sam_step(model, loss_fn, (x, y), optimizer, microbatches=microbatches)
        else:
            parts = iter([(x[k::microbatches], y[k::microbatches]) for k in range(microbatches)])
            result = sam_step(model, loss_fn, None, optimizer, microbatches=parts)
        expected = sam_step(twin, loss_fn, (x, y), other)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(result.perturbed_loss, expected.perturbed_loss, rtol=1e-13, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)  # float64 sums in another order


def test_both_passes_of_a_micro_batch_have_the_same_masks() -> None:
    model, optimizer, _, _ = pair(lambda: nn.Sequential(nn.Dropout(0.5), *net()))
    masks: list[Tensor] = []
    model[0].register_forward_hook(lambda _m, _x, y: masks.append(y == 0))  # type: ignore[index, operator]
    sam_step(model, mean_loss, batch(0), optimizer, microbatches=3)
    assert len(masks) == 6
    assert all(torch.equal(a, b) for a, b in zip(masks[:3], masks[3:], strict=True))


@pytest.mark.parametrize(("fraction", "microbatches"), [(0.25, 1), (0.4, 5), (0.001, 1)])
def test_partial_ascent_uses_the_first_part_of_the_batch(fraction: float, microbatches: int) -> None:
    model, optimizer, twin, other = pair(lambda: net(dtype=torch.float64))
    for step in range(3):
        x, y = batch(step, torch.float64)
        sam_step(model, mean_loss, (x, y), optimizer, ascent_fraction=fraction, microbatches=microbatches)
        k = max(1, round(fraction * len(x)))
        mean_loss(twin, (x[:k], y[:k])).backward()
        other.first_step(zero_grad=True)
        mean_loss(twin, (x, y)).backward()
        other.second_step(zero_grad=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("microbatches", [1, 5])
def test_selection_updates_with_the_samples_of_largest_rise(microbatches: int) -> None:
    model, optimizer, twin, other = pair(lambda: net(dtype=torch.float64), Selecting)
    for step in range(4):
        x, y = batch(step, torch.float64)
        result = sam_step(model, sample_losses, (x, y), optimizer, microbatches=microbatches)
        before = sample_losses(twin, (x, y))
        before.mean().backward()
        other.first_step(zero_grad=True)
        rise = (sample_losses(twin, (x, y)) - before).detach()
        keep = rise.argsort(descending=True)[: round(0.4 * len(x))]
        assert sorted(keep.tolist()) == select_sharp(before, before + rise, 0.4).tolist()
        loss = mean_loss(twin, (x[keep], y[keep]))
        loss.backward()
        other.second_step(zero_grad=True)
        torch.testing.assert_close(result.perturbed_loss, loss.detach(), rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_selection_measures_the_rise_under_the_same_masks() -> None:
    model, optimizer, _, _ = pair(lambda: nn.Sequential(nn.Dropout(0.5), *net()), Selecting)
    masks: list[Tensor] = []
    model[0].register_forward_hook(lambda _m, _x, y: masks.append(y == 0))  # type: ignore[index, operator]
    sam_step(model, sample_losses, batch(0), optimizer)
    assert [len(mask) for mask in masks] == [32, 32, round(0.4 * 32)]
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("microbatches", [1, 4])
def test_selection_without_sample_losses_is_an_error_and_changes_nothing(microbatches: int) -> None:
    model, optimizer, _, _ = pair(net, Selecting)
    sam_step(model, sample_losses, batch(0), optimizer)
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"needs one loss per sample, shape \[\d+\], but loss_fn returned \[\]"):
        sam_step(model, mean_loss, batch(0), optimizer, microbatches=microbatches)
    with pytest.raises(ValueError, match="ascent_fraction must be 1"):
        sam_step(model, sample_losses, batch(0), optimizer, ascent_fraction=0.5)
    before.assert_unchanged()
    assert not optimizer.perturbed


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_scaled_losses_give_the_step_of_unscaled_ones(autocast: torch.dtype | None) -> None:
    model, optimizer, twin, other = pair(net)
    scaler = GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    for step in range(5):
        sam_step(model, mean_loss, batch(step), optimizer, scaler=scaler, autocast=autocast, microbatches=2)
        sam_step(twin, mean_loss, batch(step), other, autocast=autocast, microbatches=2)
    assert scaler.get_scale() == 2.0**8  # update() was called in each step
    # A power of two scales exactly. In fp16, small gradients are kept only with the scale; the limit is its precision.
    tolerance = 5e-3 if autocast is torch.float16 else 1e-5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def test_autocast_covers_the_loss_function() -> None:
    model, optimizer, _, _ = pair(net)
    dtypes = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        dtypes.append(model(batch[0]).dtype)
        return mean_loss(model, batch)

    sam_step(model, loss_fn, batch(0), optimizer, autocast=torch.bfloat16)
    assert dtypes == [torch.bfloat16] * 2


def test_autocast_around_the_step_does_not_keep_casts_of_old_weights() -> None:
    model, optimizer, twin, other = pair(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(3):
            sam_step(model, mean_loss, batch(step), optimizer)
    for step in range(3):
        sam_step(twin, mean_loss, batch(step), other, autocast=torch.bfloat16)
    assert_same_optimizers(optimizer, other)


@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_update_is_in_the_result_and_holds_the_scheduler(in_pass: int, scaled: bool) -> None:
    model, optimizer, _, _ = pair(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = GradScaler("cpu", init_scale=4.0) if scaled else None
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return mean_loss(model, batch) * (torch.inf if calls == in_pass + 2 else 1)

    for expected in (0.05, 0.05, 0.025):
        before = Snapshot(optimizer)
        result = sam_step(model, loss_fn, batch(0), optimizer, scaler=scaler, scheduler=scheduler)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        if result.skipped:
            before.assert_unchanged()
            assert calls == 4


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_in_any_pass_leaves_the_weights_and_the_generators(call: int) -> None:
    model, optimizer, _, _ = pair(regular_net)
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return mean_loss(model, batch)

    before = Snapshot(optimizer)
    with pytest.raises(KeyboardInterrupt):
        sam_step(model, loss_fn, batch(0), optimizer, microbatches=2)
    before.assert_unchanged()
    assert not optimizer.perturbed
    assert model[1].track_running_stats and model[1].num_batches_tracked == min(call - 1, 2)  # type: ignore[index]
    sam_step(model, loss_fn, batch(0), optimizer)  # the next step uses only its own gradients


def test_gradients_from_before_the_step_do_not_count() -> None:
    model, optimizer, twin, other = pair(net)
    mean_loss(model, batch(7)).backward()
    sam_step(model, mean_loss, batch(0), optimizer)
    sam_step(twin, mean_loss, batch(0), other)
    assert_same_optimizers(optimizer, other)


def test_models_that_return_their_loss_take_a_mapping() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.net(inputs), labels)

    model = Model()
    x, y = batch(0)
    optimizer = SAM(model.parameters(), **OPTIONS)
    twin = net()
    other = SAM(twin.parameters(), **OPTIONS)
    result = sam_step(model, lambda model, batch: model(**batch), {"inputs": x, "labels": y}, optimizer, microbatches=2)
    expected = sam_step(twin, mean_loss, (x, y), other, microbatches=2)
    assert same_bits(result.loss, expected.loss)
    assert_same_optimizers(optimizer, other)


def test_a_step_that_does_not_perturb_has_one_pass() -> None:
    model, optimizer, twin, plain = pair(net, OnePass)
    calls = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return mean_loss(model, batch)

    for step in range(3):
        result = sam_step(model, loss_fn, batch(step), optimizer)
        assert result.perturbed_loss is None and not result.skipped
        plain.zero_grad()
        mean_loss(twin, batch(step)).backward()
        plain.step()
    assert len(calls) == 3
    assert_same_optimizers(optimizer, plain)


def test_steps_between_a_schedule_s_perturbations_have_one_pass() -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), schedule=Every(3), **OPTIONS)
    other = SAM(twin.parameters(), **OPTIONS)
    for step in range(5):
        result = sam_step(model, mean_loss, batch(step), optimizer, scaler=GradScaler("cpu", init_scale=1.0))
        assert (result.perturbed_loss is not None) == (step % 3 == 0)
        other.param_groups[0]["rho"] = OPTIONS["rho"] if step % 3 == 0 else 0.0
        sam_step(twin, mean_loss, batch(step), other, scaler=GradScaler("cpu", init_scale=1.0))
    assert_same_optimizers(optimizer, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent_fraction": 0.0}, "ascent_fraction must be above 0"),
        ({"ascent_fraction": 1.5}, "ascent_fraction must be above 0"),
    ],
)
def test_options_out_of_range_are_errors_before_any_pass(options: dict[str, Any], message: str) -> None:
    model, optimizer, _, _ = pair(net)
    with pytest.raises(ValueError, match=message):
        sam_step(model, lambda *_: pytest.fail("ran"), batch(0), optimizer, **options)


def test_a_loss_of_the_wrong_shape_is_an_error() -> None:
    model, optimizer, _, _ = pair(net)
    with pytest.raises(ValueError, match=r"shape \[\], or one loss per sample, shape \[B\], not \[32, 3\]"):
        sam_step(model, lambda model, batch: model(batch[0]), batch(0), optimizer)


def test_other_optimizers_and_perturbed_weights_are_errors() -> None:
    model, optimizer, _, _ = pair(net)
    with pytest.raises(TypeError, match=r"not SGD: .* use SAM with rho=0"):
        sam_step(model, mean_loss, batch(0), torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    mean_loss(model, batch(0)).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"restore\(\)"):
        sam_step(model, mean_loss, batch(0), optimizer)


def test_a_model_is_compiled_once_per_kind_of_pass() -> None:
    compilations = []

    def counting(graph: Any, _inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    model, optimizer, twin, other = pair(regular_net)
    compiled = torch.compile(model, backend=counting)
    torch.manual_seed(0)
    for step in range(6):
        sam_step(compiled, mean_loss, batch(step), optimizer)  # type: ignore[arg-type]
        if step == 0:
            first = len(compilations)
    assert len(compilations) == first <= 2
    torch.manual_seed(0)
    for step in range(6):
        sam_step(twin, mean_loss, batch(step), other)
    assert_same_optimizers(optimizer, other)
    assert_same_bits(model.buffers(), twin.buffers())


@pytest.mark.parametrize("method", ["SAM", "MicrobatchSAM"])
def test_the_last_smaller_batch_of_an_epoch_takes_fewer_micro_batches(backend: str, method: str) -> None:
    """A batch of 3 samples takes 3 micro-batches instead of 4. The next whole batch takes 4 again."""
    model, twin = net(dtype=torch.float64), net(dtype=torch.float64)
    own = {"num_microbatches": 4} if method == "MicrobatchSAM" else {}
    less = {"num_microbatches": 3} if method == "MicrobatchSAM" else {}
    cut = {} if own else {"microbatches": 4}
    base: dict[str, Any] = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, "backend": backend}
    optimizer = getattr(fused_sam, method)(model.parameters(), **base, **own)
    other = getattr(fused_sam, method)(twin.parameters(), **base, **less)
    x, y = batch(0, torch.float64)
    small = (x[:3], y[:3])
    sam_step(model, mean_loss, small, optimizer, **cut)
    sam_step(twin, mean_loss, small, other, **({} if own else {"microbatches": 3}))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p, q)
    if own:
        assert optimizer.num_microbatches == 4
        seen: list[int] = []
        sam_step(model, lambda m, b: (seen.append(len(b[1])), mean_loss(m, b))[1], (x, y), optimizer)
        assert seen == [8] * 8
