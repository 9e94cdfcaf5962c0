"""SAM in transformers' Trainer gives the weights of a loop written out, with accumulation, bf16, skips, checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bits import assert_same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam import SAM
from fused_sam.training import sam_step

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from fused_sam.integrations.transformers import SAMTrainer  # noqa: E402

SAMPLES, SIZE = 30, 6
OPTIONS: dict[str, Any] = {"rho": 0.2, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


@pytest.fixture(autouse=True)
def _no_state_of_other_tests() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        self.infinite: list[int] = []  # calls of forward() whose loss is infinite
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        logits = self.net(x)
        loss = cross_entropy(logits.float(), labels) * (torch.inf if self.calls in self.infinite else 1)
        return {"loss": loss, "logits": logits}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def trainer(model: nn.Module, folder: Path, sam: SAM | None = None, **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": SIZE,
        "num_train_epochs": 2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        **options,
    }
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **settings
    )
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (SAM, OPTIONS)} if sam is None else {"optimizers": (sam, None)}
    made = SAMTrainer(model, arguments, train_dataset=data(), **given)
    made.remove_callback(transformers.PrinterCallback)
    return made


def train(trainer: Any, **options: Any) -> None:
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(**options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_equals_the_loop_written_out(tmp_path: Path, accumulate: int, bf16: bool, clip: float) -> None:
    model = Model()
    sam = SAM(model.parameters(), **OPTIONS)
    # Trainer seeds the generator from which dropout would draw.
    model.net[3].p = 0.0
    run = trainer(model, tmp_path, sam, gradient_accumulation_steps=accumulate, bf16=bf16, max_grad_norm=clip)
    train(run)

    twin = Model()
    twin.net[3].p = 0.0
    other = SAM(twin.parameters(), **OPTIONS)
    if clip:  # Trainer clips the gradients before step(), which are the second ones

        def clipped(*_: Any) -> None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)

        other.register_step_pre_hook(clipped)
    rows, losses = data(), []
    batches = [
        {name: torch.stack([row[name] for row in rows[k : k + SIZE]]) for name in ("x", "labels")}
        for k in range(0, SAMPLES, SIZE)
    ]
    for _ in range(2):
        for k in range(0, len(batches), accumulate):
            result = sam_step(
                twin,
                lambda model, batch: model(**batch)["loss"],
                None,
                other,
                microbatches=batches[k : k + accumulate],
                autocast=torch.bfloat16 if bf16 else None,
            )
            losses.append(result.loss.item())
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=2e-2 if bf16 else 1e-3)  # some versions round to four places
    for name, value in model.state_dict().items():
        # Trainer divides by 2, and this loop multiplies by 1/2. bf16 rounds the difference up to an ulp of bf16.
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-5, atol=1e-2 if bf16 else 1e-5)
    assert model.net[1].num_batches_tracked == 2 * len(batches)
    assert run.state.global_step == 2 * -(-len(batches) // accumulate)


def test_masks_are_the_same_in_both_passes(tmp_path: Path) -> None:
    model = Model()
    masks: list[Tensor] = []
    model.net[3].register_forward_hook(lambda _m, x, y: masks.append((x[0] != 0) & (y == 0)))
    options = {**OPTIONS, "rho": 1e-9}  # ReLU's zeros stay, because the weights hardly move
    train(trainer(model, tmp_path, SAM(model.parameters(), **options), gradient_accumulation_steps=2))
    assert len(masks) == 2 * 2 * 5
    for first, second in ([0, 1], [2, 3]), ([4, 5], [6, 7]), ([8], [9]):
        assert all(torch.equal(masks[a], masks[b]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_skipped_step_holds_the_scheduler(tmp_path: Path, in_pass: int) -> None:
    model = Model()
    model.infinite = [2 + in_pass]
    run = trainer(model, tmp_path, lr_scheduler_type="linear", num_train_epochs=1)
    train(run)
    assert all(p.isfinite().all() for p in model.parameters())
    assert run.state.global_step == 5
    assert run.lr_scheduler.last_epoch == 4


def test_a_run_resumes_from_its_checkpoint_bit_equal(tmp_path: Path) -> None:
    whole = Model()
    train(trainer(whole, tmp_path, save_strategy="epoch", lr_scheduler_type="linear"))
    again = Model()
    run = trainer(again, tmp_path, save_strategy="epoch", lr_scheduler_type="linear")
    train(run, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert run.state.global_step == 10
    assert_same_bits(whole.state_dict().values(), again.state_dict().values())


def test_an_exception_between_the_passes_restores_the_weights(tmp_path: Path) -> None:
    model = Model()
    sam = SAM(model.parameters(), **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]

    def fail(*_: Any) -> None:
        if sam.perturbed:
            raise KeyError

    model.net[4].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        train(trainer(model, tmp_path, sam))
    assert_same_bits([p.detach() for p in model.parameters()], before)


def test_other_optimizers_are_errors(tmp_path: Path) -> None:
    model = Model()
    run = trainer(model, tmp_path, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"accelerator.prepare\(\), not AcceleratedOptimizer around SGD\. A Trainer"):
        train(run)
