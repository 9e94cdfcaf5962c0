"""Runs every cell of the table in docs/frameworks.md, against the same loop in plain torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.family import NEED_ADAM, with_frozen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fused_sam
from fused_sam import ESAM, MicrobatchSAM
from fused_sam.methods.displaced import DisplacedSAM
from fused_sam.training import sam_step, select_sharp

STEPS, SIZE = 3, 8
BASE = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}
OPTIONS: dict[str, dict[str, Any]] = {
    "ESAM(gamma=1)": {"gamma": 1.0, "beta": 0.5},
    "ESAM(gamma=0.5)": {"gamma": 0.5, "beta": 0.5},
    "FlatLoRA": {"total": 4},
    "LESAM": {"total": 4},
    "LookSAM": {"k": 2},
    "LookLayerSAM": {"k": 2},
    "MicrobatchSAM(2)": {"num_microbatches": 2},
}
Make = Callable[[Any], Any]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SIZE, 5, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def maker(row: str) -> Make:
    method = with_frozen if row == "FlatLoRA" else fused_sam.METHODS[row.partition("(")[0]]
    if row in NEED_ADAM:
        return lambda params: method(params, torch.optim.AdamW, rho=0.1, lr=0.01)
    return lambda params: method(params, torch.optim.SGD, **{**BASE, **OPTIONS.get(row, {})})


def hand_step(model: nn.Module, optimizer: Any, batch: Any, backward: Callable[[Tensor], Any]) -> None:
    """Take a step of any method by hand; the optimizer may be a framework's wrapper."""
    x, y = batch
    parts = [(x, y)]
    if hasattr(optimizer, "num_microbatches"):
        parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
    optimizer.zero_grad()
    for k, (x, y) in enumerate(parts):
        before = cross_entropy(model(x), y, reduction="none")
        backward(before.mean())
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            if getattr(optimizer, "selected_fraction", None) is not None:
                with torch.no_grad():
                    after = cross_entropy(model(x), y, reduction="none")
                chosen = select_sharp(before, after, optimizer.gamma)
                x, y = x[chosen], y[chosen]
            backward(cross_entropy(model(x), y))
        if k < len(parts) - 1:
            optimizer.next_microbatch()
    optimizer.step()


def in_torch(make: Make) -> nn.Module:
    model = net()
    optimizer = make(model.parameters())
    for _ in range(STEPS):
        hand_step(model, optimizer, data(), Tensor.backward)
    clean(optimizer)
    return model


def clean(optimizer: Any) -> None:
    if isinstance(optimizer, DisplacedSAM):
        optimizer.eval()


# ---- one function per column: trains net() for STEPS steps, and returns it with clean weights -----------------------


def fit_lightning(module: Any, **options: Any) -> Any:
    import lightning

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        **{"max_epochs": STEPS, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **silent, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(TensorDataset(*data()), batch_size=SIZE)
        trainer.fit(module, loader, loader if hasattr(module, "seen") else None)
    return trainer


def lightning_module(make: Make, kind: str) -> Any:
    import lightning

    from fused_sam.integrations.lightning import SAMMixin, two_pass_step

    class Module(SAMMixin, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = kind == "automatic"

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            if kind == "automatic":
                return cross_entropy(self.net(x), y)
            if kind == "two passes":
                return two_pass_step(
                    self, self.optimizers(), lambda: self.manual_backward(cross_entropy(self.net(x), y))
                )
            return hand_step(self.net, self.optimizers(), batch, self.manual_backward)

        def configure_optimizers(self) -> Any:
            self.sam = make(self.parameters())
            return self.sam

    return Module()


def lightning_of(kind: str) -> Callable[..., nn.Module]:
    def run(make: Make, _: Path) -> nn.Module:
        pytest.importorskip("lightning")
        module = lightning_module(make, kind)
        trainer = fit_lightning(module)
        assert trainer.global_step == STEPS
        assert kind == "by hand" or not getattr(module.sam, "displaced", False)
        clean(module.sam)
        return module.net

    return run


def fabric(make: Make, _: Path) -> nn.Module:
    from_lightning = pytest.importorskip("lightning.fabric")
    fabric = from_lightning.Fabric(accelerator="cpu", devices=1)
    bare = net()
    sam = make(bare.parameters())
    model, optimizer = fabric.setup(bare, sam)
    for _ in range(STEPS):
        hand_step(model, optimizer, data(), fabric.backward)
    clean(sam)
    return bare


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    yield
    try:
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerate_of(by_hand: bool) -> Callable[..., nn.Module]:
    def run(make: Make, _: Path) -> nn.Module:
        accelerate = pytest.importorskip("accelerate")
        from fused_sam.integrations.accelerate import AcceleratedSAM, wrapped_sam

        accelerator = accelerate.Accelerator(cpu=True)
        bare = net()
        model, optimizer = accelerator.prepare(bare, make(bare.parameters()))
        if by_hand:
            wrapped_sam(optimizer)
            for _ in range(STEPS):
                hand_step(model, optimizer, data(), accelerator.backward)
        else:
            step = AcceleratedSAM(accelerator, model, optimizer, lambda m, b: cross_entropy(m(b[0]), b[1]))
            for _ in range(STEPS):
                step(data())
                assert not getattr(optimizer.optimizer, "displaced", False)
        clean(optimizer.optimizer)
        return bare

    return run


class WithLoss(nn.Module):
    """A model that returns its loss, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def make_trainer(make: Make, folder: Path, **options: Any) -> tuple[Any, WithLoss, Any]:
    transformers = pytest.importorskip("transformers")
    from fused_sam.integrations.transformers import SAMTrainer

    transformers.logging.set_verbosity_error()
    model = WithLoss()
    sam = make(model.parameters())
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": SIZE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    trainer = SAMTrainer(
        model,
        transformers.TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(sam, None),
    )
    return trainer, model, sam


def trainer(make: Make, folder: Path) -> nn.Module:
    trainer, model, sam = make_trainer(make, folder)
    trainer.train()
    assert not getattr(sam, "displaced", False)
    return model.net


def skorch(make: Make, _: Path) -> nn.Module:
    skorch = pytest.importorskip("skorch")
    x, y = data()
    found: list[Any] = []

    def made(params: Any, lr: float) -> Any:
        found.append(make(params))
        return found[-1]

    learner = skorch.NeuralNet(
        net, criterion=nn.CrossEntropyLoss, optimizer=made, lr=0.1, max_epochs=STEPS, batch_size=SIZE,
        train_split=None, verbose=0, iterator_train__shuffle=False,
    )  # fmt: skip
    learner.fit(x, y)
    clean(found[-1])
    return learner.module_


def ignite(make: Make, _: Path) -> nn.Module:
    engine = pytest.importorskip("ignite.engine")
    model = net()
    optimizer = make(model.parameters())
    reduction = "mean" if getattr(optimizer, "selected_fraction", None) is None else "none"

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    def update(_: Any, batch: Any) -> float:
        return sam_step(model, loss_fn, batch, optimizer).loss.item()

    engine.Engine(update).run([data()], max_epochs=STEPS)
    clean(optimizer)
    return model


COLUMNS: dict[str, Callable[[Make, Path], nn.Module]] = {
    "Lightning, `SAMMixin`": lightning_of("automatic"),
    "Lightning, `two_pass_step`": lightning_of("two passes"),
    "Lightning, by hand": lightning_of("by hand"),
    "Fabric, by hand": fabric,
    "accelerate, `AcceleratedSAM`": accelerate_of(by_hand=False),
    "accelerate, by hand": accelerate_of(by_hand=True),
    "`SAMTrainer`": trainer,
    "skorch": skorch,
    "ignite, `sam_step`": ignite,
}


def cells() -> list[tuple[str, str, str]]:
    """Return row, column and promise of each cell in the page's table."""
    page = Path(__file__).parents[1] / "docs" / "frameworks.md"
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    head = rows[0]
    return [
        (row[0], column, promise)
        for row in rows[2:]
        if len(row) == len(head)
        for column, promise in zip(head[1:], row[1:], strict=True)
    ]


def test_the_table_has_every_method_and_framework() -> None:
    assert {row.partition("(")[0] for row, *_ in cells()} == set(fused_sam.METHODS)
    assert {column for _, column, _ in cells()} == set(COLUMNS)
    assert {promise for *_, promise in cells()} == {"works", "refused"}


@pytest.mark.parametrize(("row", "column", "promise"), cells())
def test_a_cell(row: str, column: str, promise: str, tmp_path: Path) -> None:
    if promise == "works":
        found, expected = COLUMNS[column](maker(row), tmp_path), in_torch(maker(row))
        for p, q in zip(found.parameters(), expected.parameters(), strict=True):
            # A loader shuffles the batch, and a mean over samples in another order rounds differently.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
        return
    method = row.partition("(")[0]
    named = {"skorch": "closure"}.get(column, column.partition(",")[0].replace("`SAMTrainer`", "Trainer"))
    made: list[Any] = []

    def make(params: Any) -> Any:
        made.append(maker(row)(params))
        return made[-1]

    with pytest.raises((TypeError, ValueError, RuntimeError), match="sam_step") as error:
        COLUMNS[column](make, tmp_path)
    assert named in str(error.value) and (method in str(error.value) or "gamma" in str(error.value))
    for p, q in zip(made[-1].param_groups[0]["params"], net().parameters(), strict=True):
        assert torch.equal(p, q)
    assert not made[-1].perturbed


# ---- mixed precision, averages, validation and saving ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["automatic", "two passes", "by hand"])
@pytest.mark.parametrize("row", ["SAM", "GSAM", "MomentumSAM"])
def test_a_gradient_scaler_in_lightning(row: str, kind: str) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    class Scaled(MixedPrecision):
        """Scales the loss without autocast, so that the weights can be compared."""

        def forward_context(self) -> Any:
            return nullcontext()

    module = lightning_module(maker(row), kind)
    fit_lightning(module, plugins=[Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))])
    clean(module.sam)
    for p, q in zip(module.net.parameters(), in_torch(maker(row)).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("row", ["SAM", "MomentumSAM"])
@pytest.mark.parametrize("kind", ["automatic", "two passes"])
def test_lightning_validates_averages_and_saves_clean_weights(row: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging

    module = lightning_module(maker(row), kind)
    module.seen = []

    def validation_step(batch: Any, batch_idx: int) -> None:
        module.seen.append([p.detach().clone() for p in module.net.parameters()])
        module.log("val_loss", cross_entropy(module.net(batch[0]), batch[1]))

    module.validation_step = validation_step
    saved = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", mode="max", save_top_k=-1, every_n_train_steps=1)
    callbacks = [saved] if kind == "two passes" else [saved, StochasticWeightAveraging(0.1, swa_epoch_start=0.99)]
    fit_lightning(module, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    model = net()
    optimizer = maker(row)(model.parameters())
    for step in range(STEPS):
        hand_step(model, optimizer, data(), Tensor.backward)
        with optimizer.unperturbed():
            for p, q in zip(module.seen[step], model.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        loaded = torch.load(file, weights_only=False)
        step = loaded["global_step"]
        for p, q in zip(loaded["state_dict"].values(), module.seen[step - 1], strict=True):
            assert torch.equal(p, q)


def test_trainer_saves_and_evaluates_clean_weights(tmp_path: Path) -> None:
    trainer, _, sam = make_trainer(
        maker("MomentumSAM"), tmp_path, save_strategy="steps", save_steps=1, gradient_accumulation_steps=1
    )
    trainer.train()
    expected = net()
    optimizer = maker("MomentumSAM")(expected.parameters())
    from safetensors.torch import load_file

    for step in range(1, STEPS + 1):
        hand_step(expected, optimizer, data(), Tensor.backward)
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        with optimizer.unperturbed():
            for name, q in expected.named_parameters():
                p = saved[f"net.{name}"]
                torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
    trainer.evaluate()
    assert not sam.displaced


def test_fabric_finishes_a_step_by_second_step_and_scales() -> None:
    lightning_fabric = pytest.importorskip("lightning.fabric")
    from lightning.fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    fabric = lightning_fabric.Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    bare = net()
    model, optimizer = fabric.setup(bare, maker("SAM")(bare.parameters()))
    with pytest.raises(RuntimeError, match="was called without first_step"):
        optimizer.second_step()
    for _ in range(STEPS):
        fabric.backward(cross_entropy(model(data()[0]), data()[1]))
        optimizer.first_step(zero_grad=True)
        assert optimizer.perturbed
        fabric.backward(cross_entropy(model(data()[0]), data()[1]))
        optimizer.second_step(zero_grad=True)
    for p, q in zip(bare.parameters(), in_torch(maker("SAM")).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)  # fp16 products
    assert isinstance(optimizer, fused_sam.SAM) and optimizer.base_optimizer is optimizer.optimizer


def test_a_prepared_optimizer_of_accelerate_finishes_by_second_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    from fused_sam.integrations.accelerate import wrapped_sam

    accelerator = accelerate.Accelerator(cpu=True)
    bare = net()
    model, optimizer = accelerator.prepare(bare, maker("SAM")(bare.parameters()))
    sam = wrapped_sam(optimizer)
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()
    for _ in range(STEPS):
        accelerator.backward(cross_entropy(model(data()[0]), data()[1]))
        optimizer.first_step(zero_grad=True)
        accelerator.backward(cross_entropy(model(data()[0]), data()[1]))
        optimizer.second_step(zero_grad=True)
    assert wrapped_sam(optimizer) is sam and not optimizer.perturbed
    for p, q in zip(bare.parameters(), in_torch(maker("SAM")).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_what_a_framework_cannot_pass_on_is_refused_in_words() -> None:
    model = net()
    with pytest.raises(TypeError, match="not tuple: return the loss alone"):
        sam_step(model, lambda m, b: (m(b[0]).sum(), 0), data(), maker("SAM")(model.parameters()))
    optimizer = maker("SAM")(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    with pytest.raises(TypeError, match="steps by a metric"):
        sam_step(model, lambda m, b: m(b[0]).sum(), data(), optimizer, scheduler=plateau)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    micro = MicrobatchSAM(model.parameters(), num_microbatches=2, lr=0.1)
    with pytest.raises(TypeError, match="takes no argument"):
        micro.step(lambda: model(data()[0]).sum())
    micro.step(lambda i=0: model(data()[0]).sum().backward())  # one that may be left out


def test_skorch_makes_the_optimizer_itself() -> None:
    skorch = pytest.importorskip("skorch")
    learner = skorch.NeuralNetClassifier(
        net, criterion=nn.CrossEntropyLoss, optimizer=fused_sam.SAM, optimizer__rho=0.1, optimizer__momentum=0.9,
        lr=0.1, max_epochs=STEPS, batch_size=SIZE, train_split=None, verbose=0, iterator_train__shuffle=False,
    )  # fmt: skip
    learner.fit(*data())
    for p, q in zip(learner.module_.parameters(), in_torch(maker("SAM")).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_ignites_own_trainer_warns_that_it_trains_without_sam() -> None:
    engine = pytest.importorskip("ignite.engine")
    model = net()
    trainer = engine.create_supervised_trainer(model, maker("SAM")(model.parameters()), cross_entropy)
    with pytest.warns(fused_sam.PlainStepWarning, match="trains without SAM"):
        trainer.run([data()], max_epochs=1)


def test_esam_by_hand_warns_once_if_nothing_is_selected() -> None:
    model = net()
    optimizer = ESAM(model.parameters(), gamma=0.5, lr=0.1)

    def step() -> None:
        cross_entropy(model(data()[0]), data()[1]).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(model(data()[0]), data()[1]).backward()
        optimizer.second_step(zero_grad=True)

    with pytest.warns(fused_sam.SelectionWarning, match="gamma=0.5"):
        step()
    step()


# ---- pipelines -------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_steps() -> None:
    from torch.utils.checkpoint import checkpoint

    model = net()
    optimizer = maker("SAM")(model.parameters())

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    for _ in range(STEPS):
        hand_step(forward, optimizer, data(), Tensor.backward)  # type: ignore[arg-type]
    for p, q in zip(model.parameters(), in_torch(maker("SAM")).parameters(), strict=True):
        assert torch.equal(p, q)


def test_lora_adapters_are_perturbed_and_updated_and_nothing_else() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    copies = [p.detach().clone() for p in trained]
    optimizer = fused_sam.SAM(trained, torch.optim.SGD, rho=0.1, lr=0.1)
    hand_step(model, optimizer, data(), Tensor.backward)

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(model(data()[0]), data()[1]), trained)

    found = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, w in zip(trained, copies, strict=True):
            p.copy_(w)
    first = grads()
    norm = torch.stack([g.square().sum() for g in first]).sum().sqrt()
    with torch.no_grad():
        for p, g in zip(trained, first, strict=True):
            p.add_(g, alpha=0.1 / float(norm))
    for p, w, g in zip(found, copies, grads(), strict=True):
        torch.testing.assert_close(p, w - 0.1 * g, rtol=1e-5, atol=1e-6)
    for p, q in zip((p for p in model.parameters() if not p.requires_grad), frozen, strict=True):
        assert torch.equal(p, q)
