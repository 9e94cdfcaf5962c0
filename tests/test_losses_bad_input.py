"""A loss that differs between the passes, used where they cannot be told apart, raises an error and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits
from support.losses import CASES, Case
from support.nets import batch, net, train_plain
from torch import Tensor, nn

import fused_sam
from fused_sam import SAM
from fused_sam.schedule import AdaptiveSchedule
from fused_sam.training import losses, sam_step
from fused_sam.training.losses import Functional, OutputBiasForgetting, ReleasedSADT, SelfDistillation

OPTIONS: dict[str, Any] = {"rho": 0.3, "lr": 0.1, "momentum": 0.9}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def trained(cls: Any = SAM, **options: Any) -> tuple[nn.Module, SAM]:
    model = net()
    optimizer = cls(model.parameters(), **OPTIONS, **options)
    if cls is not fused_sam.MomentumSAM:
        optimizer.needs_second_pass  # noqa: B018  # plain steps are meant
        train_plain(model, optimizer, range(1))
    return model, optimizer


class Nothing:
    """Checks that weights, state, gradients and random numbers stay as they are."""

    def __init__(self, optimizer: SAM) -> None:
        self.snapshot = Snapshot(optimizer)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.rng = torch.get_rng_state()

    def assert_changed(self) -> None:
        self.snapshot.assert_unchanged()
        assert torch.equal(torch.get_rng_state(), self.rng)
        for p, g in zip(self.params, self.grads, strict=True):
            assert (p.grad is None) == (g is None)
            if g is not None:
                assert_same_bits([p.grad], [g])


class Wrapped:
    """A framework's wrapper around an optimizer."""

    def __init__(self, optimizer: SAM) -> None:
        self.optimizer = optimizer


CONSTRUCTED: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: Functional(torch.optim.SGD(m.parameters())), TypeError, "needs a fused_sam optimizer, not SGD"),
    (lambda m: Functional(Wrapped(SAM(m.parameters()))), TypeError, r"not Wrapped: pass its \.optimizer"),
    (
        lambda m: SelfDistillation(fused_sam.MomentumSAM(m.parameters(), momentum=0.9)),
        TypeError, "a step of MomentumSAM has one, at displaced weights",
    ),
    (lambda m: ReleasedSADT(fused_sam.MomentumSAM(m.parameters(), momentum=0.9)), TypeError, "MomentumSAM has one"),
    (
        lambda m: OutputBiasForgetting(fused_sam.ESAM(m.parameters(), gamma=0.5)),
        ValueError, "ESAM selects samples between them: use gamma=1",
    ),
    (
        lambda m: OutputBiasForgetting(SAM(m.parameters(), schedule=AdaptiveSchedule(9))),
        ValueError, "AdaptiveSchedule decides by the first gradient whether a step perturbs",
    ),
    (
        lambda m: OutputBiasForgetting(fused_sam.WSAM(m.parameters())),
        ValueError, "WSAM updates the weights with the first gradient too",
    ),
    (
        lambda m: OutputBiasForgetting(fused_sam.LookSAM(m.parameters())),
        ValueError, "LookSAM updates the weights with the first gradient too",
    ),
    (lambda m: OutputBiasForgetting(SAM(m.parameters()), C=1.0), ValueError, "C must be above 1"),
    (lambda m: OutputBiasForgetting(SAM(m.parameters()), C="many"), TypeError, "C must be a number"),
    (lambda m: OutputBiasForgetting(SAM(m.parameters()), gamma=1.1), ValueError, "gamma must be from 0 to 1"),
    (
        lambda m: OutputBiasForgetting(SAM(m.parameters()), activation="relu"),
        ValueError, "activation must be 'sigmoid' or 'softmax', not 'relu'",
    ),
    (lambda m: SelfDistillation(SAM(m.parameters()), weight=-1.0), ValueError, "weight must be at least 0"),
    (lambda m: SelfDistillation(SAM(m.parameters()), temperature=0.0), ValueError, "temperature must be above 0"),
    (
        lambda m: ReleasedSADT(fused_sam.MicrobatchSAM(m.parameters(), num_microbatches=2)),
        TypeError, "two updates of its own per batch",
    ),
    (lambda m: ReleasedSADT(fused_sam.GSAM(m.parameters())), ValueError, "GSAM takes or changes the first gradients"),
    (lambda m: ReleasedSADT(fused_sam.GCSAM(m.parameters())), ValueError, "GCSAM takes or changes the first gradients"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTED, ids=[message for *_, message in CONSTRUCTED])
def test_options_and_optimizers(make: Callable[[nn.Module], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(net())


@every_loss
def test_the_optimizer_of_another_step(case: Case) -> None:
    model, optimizer = trained()
    loss = case.make(SAM(net().parameters(), **OPTIONS))
    nothing = Nothing(optimizer)
    with pytest.raises(ValueError, match="was made with another optimizer"):
        sam_step(model, loss, batch(0), optimizer)
    with pytest.raises(ValueError, match="has none of the model's parameters"):
        loss(model, batch(0))
    nothing.assert_changed()


@every_loss
def test_batches_that_are_no_pairs_and_outputs_that_are_no_tensors(case: Case) -> None:
    model, optimizer = trained()
    loss = case.make(optimizer)
    nothing = Nothing(optimizer)
    x, y = batch(0)
    with pytest.raises(TypeError, match=r"takes \(inputs, targets\), not dict"):
        loss(model, {"x": x, "y": y})
    loss._forward = lambda model, inputs: (model(inputs), None)
    with pytest.raises(TypeError, match="outputs as one tensor, not tuple"):
        loss(model, (x, y))
    nothing.assert_changed()


@every_loss
def test_neither_pass(case: Case) -> None:
    model, optimizer = trained()
    loss = case.make(optimizer)
    loss(model, batch(0)).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.unperturbed():
        nothing = Nothing(optimizer)
        with pytest.raises(RuntimeError, match="belongs to neither pass"):
            loss(model, batch(0))
        with torch.no_grad():
            assert torch.isfinite(loss(model, batch(0)))
        nothing.assert_changed()
    loss(model, batch(0)).backward()
    optimizer.second_step()


@pytest.mark.parametrize("name", ["Functional", "SelfDistillation"])
def test_a_second_pass_without_its_first_one(name: str) -> None:
    model, optimizer = trained()
    loss = CASES[name].make(optimizer)
    clean = Snapshot(optimizer)
    x, y = batch(0)

    def second(part: Any, message: str, error: type[Exception]) -> None:
        nothing = Nothing(optimizer)
        with pytest.raises(error, match=message):
            loss(model, part)
        nothing.assert_changed()

    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    second((x, y), "this micro-batch had no first pass with it", RuntimeError)
    optimizer.restore()
    clean.assert_unchanged()

    loss(model, (x, y)).backward()
    optimizer.first_step(zero_grad=True)
    loss(model, (x, y))
    second((x, y), "this micro-batch had no first pass with it", RuntimeError)
    optimizer.restore()

    loss(model, (x, y)).backward()
    optimizer.first_step(zero_grad=True)
    second((x[:7], y[:7]), r"shape \[32, 3\] in the first pass and of shape \[7, 3\]", ValueError)
    optimizer.restore()
    clean.assert_unchanged()


@pytest.mark.parametrize("name", ["Functional", "SelfDistillation", "OBF"])
def test_a_first_pass_of_a_part_of_the_batch(name: str) -> None:
    model, optimizer = trained()
    loss = CASES[name].make(optimizer)
    if name == "OBF":
        sam_step(model, loss, batch(0), optimizer, ascent_fraction=0.25)
        return
    nothing = Nothing(optimizer)
    with pytest.raises(ValueError, match="ascent_fraction must be 1"):
        sam_step(model, loss, batch(0), optimizer, ascent_fraction=0.25)
    nothing.assert_changed()


def test_esam_whose_gamma_falls_later() -> None:
    model, optimizer = trained(fused_sam.ESAM, gamma=1.0)
    loss = Functional(optimizer)
    optimizer.gamma = 0.5  # type: ignore[attr-defined]
    nothing = Nothing(optimizer)
    with pytest.raises(ValueError, match="use gamma=1"):
        sam_step(model, loss, batch(0), optimizer)
    with pytest.raises(ValueError, match="use gamma=1"):
        loss(model, batch(0))
    nothing.assert_changed()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_plain_step_after_the_first_pass_of_output_bias_forgetting(scaled: bool) -> None:
    model, optimizer = trained()
    loss = OutputBiasForgetting(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss(model, batch(0))).backward()
    nothing = Nothing(optimizer)
    with pytest.raises(RuntimeError, match="call first_step"):
        scaler.step(optimizer)
    nothing.assert_changed()
    with pytest.raises(RuntimeError, match="call first_step"):
        scaler.step(optimizer)
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss(model, batch(0))).backward()
    scaler.step(optimizer)
    assert not optimizer.step_was_skipped
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()  # the gradients are not the loss's


def test_a_loss_that_is_gone_checks_no_steps() -> None:
    model, optimizer = trained()
    hooks = len(optimizer._optimizer_step_pre_hooks)
    for _ in range(3):
        loss = OutputBiasForgetting(optimizer)
        loss(model, batch(0)).backward()
        optimizer.first_step()
        optimizer.restore()
    del loss
    assert len(optimizer._optimizer_step_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((4, 5, 3), torch.zeros(4, 5).long()), ((4, 3), torch.zeros(4, 3)), ((4, 3), torch.zeros(4))],
)
def test_targets_that_are_no_numbers_of_classes(outputs: tuple[int, ...], targets: Tensor) -> None:
    _, optimizer = trained()
    with pytest.raises(ValueError, match=r"outputs \[B, K\] and targets \[B\]"):
        OutputBiasForgetting(optimizer).first(torch.zeros(outputs), targets)


def test_the_package_exports_the_losses() -> None:
    assert fused_sam.training.losses is losses
    assert set(losses.__all__) >= {"OutputBiasForgetting", "Functional", "SelfDistillation", "ReleasedSADT"}
