"""Tests of SAM with accelerate: prepare(), accumulation at a loader's end, GradScaler, skipped steps, schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import SAM
from fused_sam.training import sam_step

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.state import AcceleratorState  # noqa: E402

from fused_sam.integrations.accelerate import AcceleratedSAM  # noqa: E402

SAMPLES, SIZE = 42, 6


@pytest.fixture(autouse=True)
def _no_state_of_other_tests() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    )


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]).float(), batch[1])


class Setup:
    """A model, optimizer, loader and scheduler that prepare() returned."""

    def __init__(self, accumulate: int = 1, scaler: Any = None, precision: str = "no") -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        self.accelerator.scaler = scaler  # accelerate makes a scaler only for a GPU
        self.bare = net()
        self.sam = SAM(self.bare.parameters(), rho=0.2, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.sam, 0.9)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.bare, self.sam, DataLoader(dataset(), batch_size=SIZE), schedule
        )

    def step(self, loss_fn: Any = loss_fn) -> AcceleratedSAM:
        return AcceleratedSAM(self.accelerator, self.model, self.optimizer, loss_fn)

    def epoch(self, step: AcceleratedSAM) -> list[float]:
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                losses.append(step(batch).item())
                self.schedule.step()
        return losses


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_epoch_equals_the_loop_written_out(accumulate: int, precision: str) -> None:
    setup = Setup(accumulate, precision=precision)
    torch.manual_seed(2)
    found = setup.epoch(setup.step())
    state = torch.get_rng_state()

    model = net()
    optimizer = SAM(model.parameters(), rho=0.2, lr=0.1, momentum=0.9)
    batches = [tuple(t[k : k + SIZE] for t in dataset().tensors) for k in range(0, SAMPLES, SIZE)]
    torch.manual_seed(2)
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws its workers' seed
    losses = []

    def recorded(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        if not optimizer.perturbed:
            losses.append(loss.item())
        # accelerate divides by the number of accumulation steps even if the loader ends early
        return loss * min(1, len(window) / accumulate)

    for k in range(0, len(batches), accumulate):
        window = batches[k : k + accumulate]
        # accelerate's autocast covers only the model, so that the loss is fp32.
        autocast = torch.bfloat16 if precision == "bf16" else None
        sam_step(model, recorded, None, optimizer, microbatches=window, autocast=autocast)
        optimizer.param_groups[0]["lr"] *= 0.9
    updates = -(-len(batches) // accumulate)
    assert setup.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**updates)
    assert found == pytest.approx(losses, rel=1e-2 if precision == "bf16" else 1e-5)
    assert torch.equal(state, torch.get_rng_state())
    for p, q in zip(setup.bare.state_dict().values(), model.state_dict().values(), strict=True):
        # accelerate divides by 3, and this loop multiplies by 1/3. bf16 rounds the difference up to an ulp of its own.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-2 if precision == "bf16" else 1e-5)
    assert setup.bare[1].num_batches_tracked == len(batches)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("in_pass", [1, 2])
def test_skipped_steps_are_reported_and_hold_the_scheduler(scaled: bool, in_pass: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None
    setup = Setup(scaler=scaler)
    calls = 0

    def overflowing(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_fn(model, batch) * (torch.inf if calls == 2 + in_pass else 1)

    step, shown, rates = setup.step(overflowing), [], []
    for batch in setup.loader:
        before = Snapshot(setup.sam)
        with setup.accelerator.accumulate(setup.model):
            step(batch)
            skipped = setup.optimizer.step_was_skipped
            shown.append(skipped)
            if skipped:
                before.assert_unchanged()
            setup.schedule.step()
        rates.append(setup.sam.param_groups[0]["lr"])
    assert shown == [False, True] + [False] * (len(shown) - 2)
    assert rates[:3] == pytest.approx([0.09, 0.09, 0.081])
    assert setup.accelerator.optimizer_step_was_skipped is False
    if scaler is not None:
        # GradScaler checks only second gradients.
        assert scaler.get_scale() == (8.0 if in_pass == 2 else 16.0)


def test_a_scaler_changes_no_weights() -> None:
    setup = Setup(2, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**7))
    torch.manual_seed(3)
    setup.epoch(setup.step())
    found = [p.detach().clone() for p in setup.bare.parameters()]
    _reset()
    plain = Setup(2)
    torch.manual_seed(3)
    plain.epoch(plain.step())
    for p, q in zip(found, plain.bare.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-5)  # with a scale, an FMA rounds once more


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_an_exception_restores_the_weights_and_drops_the_accumulated_batches() -> None:
    setup = Setup()
    fail = True

    def failing(model: nn.Module, batch: Any) -> Tensor:
        if fail and setup.sam.perturbed:
            raise KeyError
        return loss_fn(model, batch)

    step = setup.step(failing)
    batch = next(iter(setup.loader))
    before = Snapshot(setup.sam)
    with pytest.raises(KeyError):
        step(batch)
    before.assert_unchanged()
    fail = False
    step(batch)
    assert setup.bare[1].num_batches_tracked == 2


def test_state_is_saved_and_loaded_by_the_accelerator(tmp_path: Any) -> None:
    setup = Setup()
    setup.epoch(setup.step())
    setup.accelerator.save_state(tmp_path)
    torch.manual_seed(4)
    setup.epoch(setup.step())
    expected = [p.detach().clone() for p in setup.bare.parameters()]
    _reset()
    again = Setup()
    again.accelerator.load_state(tmp_path)
    torch.manual_seed(4)
    again.epoch(again.step())
    assert_same_bits([p.detach() for p in again.bare.parameters()], expected)


def test_optimizers_that_were_not_prepared_are_errors() -> None:
    setup = Setup()
    for optimizer in (setup.sam, torch.optim.SGD(setup.bare.parameters(), lr=0.1)):
        with pytest.raises(TypeError, match=r"accelerator.prepare\(\), not S"):
            AcceleratedSAM(setup.accelerator, setup.model, optimizer, loss_fn)
