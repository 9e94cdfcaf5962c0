"""SAM in Lightning gives the weights of a loop written out, under automatic and manual optimization."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from support.bits import assert_same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import SAM
from fused_sam.training import sam_step

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from fused_sam.integrations.lightning import SAMMixin, two_pass_step  # noqa: E402

EPOCHS, BATCHES, SIZE = 2, 4, 9


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCHES * SIZE, 6, generator=generator)
    y = torch.randint(0, 3, (BATCHES * SIZE,), generator=generator)
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def make_sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9, weight_decay=1e-3)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


class Model(lightning.LightningModule):
    """A user's plain module."""

    make = staticmethod(make_sam)

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: list[tuple[float, bool]] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.seen.append((loss.item(), self.optimizers().optimizer.perturbed if self.is_sam else False))
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    @property
    def is_sam(self) -> bool:
        return isinstance(self.optimizers().optimizer, SAM)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Mixed(SAMMixin, Model):
    """The module with the mixin."""


class Manual(Model):
    """The module with manual optimization, and two micro-batches per step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        optimizer = self.optimizers()
        micro = list(zip(*(t.tensor_split(3) for t in batch), strict=True))

        def closure() -> None:
            for part in micro:
                self.manual_backward(loss_of(self.net, part) / len(micro))

        two_pass_step(self, optimizer, closure)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


def fit(model: Any, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, enable_model_summary=False, **silent, **options
    )
    batches = data()
    dataset = TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns of workers, checkpoints and others
        trainer.fit(model, DataLoader(dataset, batch_size=SIZE))
    return trainer


def by_hand(**options: Any) -> tuple[nn.Module, list[float]]:
    """Run the same training with sam_step()."""
    model, losses = net(), []
    optimizer = make_sam(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws its workers' seed
        for batch in data():
            losses.append(sam_step(model, loss_of, batch, optimizer, **options).loss.item())
        schedule.step()
    return model, losses


def test_automatic_optimization_with_the_mixin_equals_the_loop_written_out() -> None:
    model = Mixed()
    trainer = fit(model)
    expected, losses = by_hand()
    assert_same_bits(model.net.state_dict().values(), expected.state_dict().values())
    assert trainer.global_step == EPOCHS * BATCHES
    assert [loss for loss, perturbed in model.seen if not perturbed] == losses
    assert sum(perturbed for _, perturbed in model.seen) == len(losses)
    # The logged value is the mean of the first passes' losses in the last epoch.
    mean = sum(losses[-BATCHES:]) / BATCHES
    assert trainer.callback_metrics["loss"].item() == pytest.approx(mean, rel=1e-6)


def test_automatic_optimization_without_the_mixin_makes_both_passes() -> None:
    model = Model()
    trainer = fit(model)
    assert trainer.global_step == EPOCHS * BATCHES
    assert [perturbed for _, perturbed in model.seen] == [False, True] * (EPOCHS * BATCHES)
    assert model.net[1].num_batches_tracked == 2 * EPOCHS * BATCHES  # both passes are counted, which the mixin avoids


def test_manual_optimization_accumulates_micro_batches() -> None:
    model = Manual()
    trainer = fit(model)
    expected, _ = by_hand(microbatches=3)
    for found, wanted in zip(model.net.state_dict().values(), expected.state_dict().values(), strict=True):
        # Lightning divides by 3, and this loop multiplies by 1/3. The last bits differ, over eight steps.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert trainer.global_step == EPOCHS * BATCHES


@pytest.mark.parametrize("kind", [Mixed, Manual])
def test_a_gradient_scaler_makes_both_passes(kind: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    model = kind()
    fit(model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    expected, _ = by_hand(
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3),
        autocast=torch.float16,
        microbatches=3 if kind is Manual else 1,
    )
    assert scaler.get_scale() == 2.0**10
    for found, wanted in zip(model.net.state_dict().values(), expected.state_dict().values(), strict=True):
        # Lightning casts weights again for each use, without autocast's cache. fp16 gradients round in other places.
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert model.net[1].num_batches_tracked == EPOCHS * BATCHES * (3 if kind is Manual else 1)


def test_an_exception_in_the_scaled_second_pass_restores_the_weights() -> None:
    class Breaking(Mixed):
        def training_step(self, batch: Any, k: int) -> Tensor:
            if self.optimizers().optimizer.perturbed:
                raise KeyError
            self.before = [p.detach().clone() for p in self.parameters()]
            return super().training_step(batch, k)

    for options in ({}, {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}):
        model = Breaking()
        with pytest.raises(KeyError):
            fit(model, **options)
        assert_same_bits([p.detach() for p in model.parameters()], model.before)
        assert not model._in_second_pass


def test_accumulating_under_automatic_optimization_is_an_error() -> None:
    with pytest.raises(Exception, match="accumulate_grad_batches is 2, but SAM's second pass"):
        fit(Mixed(), accumulate_grad_batches=2)


def test_other_optimizers_step_as_usual() -> None:
    class Plain(Mixed):
        make = staticmethod(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))

    model = Plain()
    fit(model)
    assert len(model.seen) == EPOCHS * BATCHES

    class Wrong(Manual):
        make = staticmethod(Plain.make)

    with pytest.raises(TypeError, match="needs a fused_sam optimizer, not SGD"):
        fit(Wrong())


def test_the_wrapper_itself_is_an_error_in_sam_step() -> None:
    class Wrapped(Manual):
        def training_step(self, batch: Any, _: int) -> None:
            sam_step(self.net, loss_of, batch, self.optimizers())

    with pytest.raises(TypeError, match=r"not LightningSAM: pass its \.optimizer"):
        fit(Wrapped())
