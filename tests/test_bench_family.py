"""Tests of the SAM family's benchmarks: every method runs, its costs are right, and a stopped run resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

import fused_sam
from bench import accuracy, family, methods, optimizer_work
from bench.__main__ import main
from bench.family import METHODS
from bench.tuning import Outcome
from fused_sam import SAM
from fused_sam.demo.data import Part, Task

SMALL = replace(accuracy.DIGITS, noise=0.4, epochs=2)
# Passes per step over ten steps, for methods without two. A pass without its backward pass counts as a third.
PASSES = {
    "sgd": 1, "sgd-2x": 1, "esam": 1 + 1 / 3 + 0.6, "esam-tensors": 1 + 1 / 3 + 0.6, "looksam": 1.2,
    "looklayersam": 1.2, "momentum": 1, "interval": 1.1, "tail": 1.3, "precondsam": 1.9, "async": 1, "random": 1,
}  # fmt: skip


def trials_of(name: str) -> list[accuracy.FamilyTrial]:
    return accuracy.trials_of(name, [0.05], METHODS[name].grid)


def random_task(images: int, pixels: int = 9) -> Task:
    generator = torch.Generator().manual_seed(0)
    part = Part(torch.randn(images, pixels, generator=generator), torch.randint(10, (images,), generator=generator))
    return Task(part, part, part)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_its_number_of_passes(name: str) -> None:
    setting = replace(SMALL, epochs=1, batch_size=10)
    trial = trials_of(name)[-1]
    run = accuracy.train(random_task(100), trial, 0, setting)
    passes = PASSES.get(name, 2)
    assert run.passes == pytest.approx(passes * METHODS[name].stretch)
    # The estimate is rounded up for ESAM, and is of long runs for PrecondSAM, whose first step has one pass.
    assert METHODS[name].passes == pytest.approx(passes, abs=0.11)
    assert np.isfinite(run.curve.test_loss[-1])
    assert 0 <= run.test_accuracy <= 1


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].stretch == 1])
def test_a_step_changes_every_weight_and_no_two_methods_agree(name: str) -> None:
    def trained(which: str) -> torch.Tensor:
        model = methods.mlp(9, 10, 0)
        optimizer = METHODS[which].build(model.parameters(), 4, lr=0.1)
        task = random_task(12)
        for _ in range(4):
            family.step(model, optimizer, task.train.x, task.train.y)
        family.restore_clean_weights(optimizer)
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    ours, start = trained(name), torch.cat([p.detach().flatten() for p in methods.mlp(9, 10, 0).parameters()])
    assert ours.isfinite().all()
    assert not torch.equal(ours, start)
    if name != "sgd":
        assert not torch.equal(ours, trained("sgd"))


def test_every_class_of_the_package_is_compared_and_a_new_one_needs_no_entry() -> None:
    assert {*family.OWN, *family.NOT_COMPARED} <= set(fused_sam.METHODS)
    assert len(family.entries(fused_sam.METHODS)) == len(fused_sam.METHODS) - len(family.NOT_COMPARED)
    assert family.entries(fused_sam.METHODS).keys() <= METHODS.keys()

    class NewSAM(SAM):
        DEFAULTS = {"rho": 0.5}  # noqa: RUF012
        OPTIONS = {"alpha": fused_sam.option(0.4, low=0, high=1)}  # noqa: RUF012

    ((key, method),) = family.entries({"NewSAM": NewSAM}).items()
    assert (key, method.label, method.bytes, method.target) == ("newsam", "NewSAM", None, None)
    assert method.grid == family.rhos(0.25, 0.5, 1.0)
    assert isinstance(method.build([Parameter(torch.ones(3))], 1, lr=0.1, **method.grid[1]), NewSAM)


def test_names_in_committed_results_are_known() -> None:
    for path in (Path(__file__).parents[1] / "bench" / "results").glob("*/*.json"):
        content = json.loads(path.read_text())
        for kind in ("methods", "optimizer_work", "accuracy"):
            for run in content.get(kind, []):
                assert run["methods"].keys() <= METHODS.keys(), path


def test_a_schedule_over_the_whole_training_starts_again_in_every_turn() -> None:
    param = Parameter(torch.ones(3))
    optimizer = METHODS["tail"].build([param], 10, lr=0.1)
    assert isinstance(optimizer, SAM)
    for _ in range(2):
        family.rewind(optimizer)
        perturbed = []
        for _ in range(10):
            param.grad = torch.ones(3)
            perturbed.append(optimizer.needs_second_pass)
            if perturbed[-1]:
                optimizer.first_step()
            optimizer.step()
        assert perturbed == [False] * 7 + [True] * 3


def test_sizes_of_the_networks() -> None:
    count = {name: sum(p.numel() for p in entry.build(0).parameters()) for name, entry in methods.NETWORKS.items()}
    assert count == {"cnn": 94_538, "mlp": 669_706}


@pytest.mark.parametrize("name", ["sam", "microbatch"])
def test_timing_without_a_model_sets_fresh_gradients_for_both_passes(name: str) -> None:
    given = [[torch.full((3, 5), value)] for value in (1.0, -2.0)]
    param = Parameter(torch.ones(3, 5))
    stepper = optimizer_work.Stepper([param], METHODS[name].build([param], 1, lr=0.1), given)
    for _ in range(2):
        for phase in stepper.phases():
            phase()
    other = Parameter(torch.ones(3, 5))
    sam = SAM([other], lr=0.1, momentum=family.MOMENTUM)
    # The second of two micro-batches adds nothing, so that the mean is half the gradient.
    share = 0.5 if name == "microbatch" else 1.0
    for _ in range(2):
        for half, (value,) in zip((sam.first_step, sam.second_step), given, strict=True):
            other.grad = value.clone() * (share if value is given[1][0] else 1.0)
            half()
    torch.testing.assert_close(param, other, rtol=1e-6, atol=0)  # halves are exact, but the sums have another order


def test_bytes_of_the_methods_whose_steps_differ() -> None:
    assert METHODS["looksam"].bytes == pytest.approx(48)  # 64 in one step, 44 in four
    assert METHODS["interval"].bytes == pytest.approx(26)  # 44 in one step, 24 in nine
    assert METHODS["tail"].bytes == pytest.approx(30)  # 44 in three steps, 24 in seven
    assert METHODS["microbatch"].bytes == 72


def test_optimizer_work_counts_only_timed_phases_per_step() -> None:
    work = optimizer_work.measure("2x7", ["sam", "interval", "esam-tensors"], rounds=2)
    assert set(work.steps) == {"sam", "interval"}  # the bytes of whole tensors depend on the mask
    assert all(values.shape == (2,) for values in [*work.steps.values(), work.copy])
    fraction = work.copy_fraction("sam").value
    assert fraction == pytest.approx(44 / 8 * np.median(work.copy) / np.median(work.steps["sam"]))


def test_methods_command_writes_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--network", "mlp", "--method", "looksam", "--method", "sam", "--out", str(tmp_path)]
    assert main(["methods", *arguments]) == 0
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "methods.json").read_text())["methods"]
    assert list(run["methods"]) == ["sgd", "sam", "looksam"]
    assert run["methods"]["sgd"]["ratio"]["value"] == 1
    (work,) = json.loads((folder / "optimizer_work.json").read_text())["optimizer_work"]
    assert work["methods"]["looksam"]["bytes"] == 48
    for name in ("methods.png", "optimizer_work.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "LookSAM(5)" in capsys.readouterr().out


# ---- accuracy -----------------------------------------------------------------------------------------------


def outcome(name: str, seconds: float, *test: float) -> Outcome:
    trials = trials_of(name)
    runs = [
        accuracy.finished(trials[0], seed, validation=0.5, test=value, loss=1.0, seconds=seconds, passes=2.0)
        for seed, value in enumerate(test)
    ]
    return Outcome(trials, [0.5] * len(trials), trials[0], runs)


def test_mean_spread_and_frontier() -> None:
    cheap, worse, best, dear = (
        outcome("sgd", 1.0, 0.7, 0.8), outcome("gsam", 2.0, 0.7, 0.7), outcome("sam", 2.0, 0.9, 0.9),
        outcome("wsam", 3.0, 0.9, 0.9),
    )  # fmt: skip
    result = accuracy.Result(SMALL, [dear, worse, cheap, best])
    assert (result.mean(cheap), result.deviation(cheap)) == pytest.approx((75, 100 * np.std([0.7, 0.8], ddof=1)))
    assert result.frontier() == [cheap, best]  # wsam is as good as sam and costs more
    written = result.as_json()["methods"]
    assert [name for name, row in written.items() if row["frontier"]] == ["sgd", "sam"]
    assert written["sam"]["chosen"] == {"lr": 0.05, "rho": 0.1}


def test_a_stopped_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "here" / "journal.jsonl"
    trained: list[str] = []
    real = accuracy.train

    def train(task: Task, trial: accuracy.FamilyTrial, seed: int, setting: accuracy.Setting) -> accuracy.Finished:
        trained.append(f"{trial}, seed {seed}")
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(task, trial, seed, setting)

    monkeypatch.setattr(accuracy, "train", train)
    source = accuracy.load(SMALL, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(SMALL, source, ["sgd", "sam"], 2, accuracy.Journal(path))
    with path.open("a") as file:
        file.write('{"key": {"method": "sam", "opt')  # as after a kill within a write
    journal = accuracy.Journal(path)
    runs = 5 + 1 + 5 + 2 + 1  # learning rates, SAM's two other values of rho, and a second seed of each
    assert journal.fraction(SMALL, runs) == 3 / runs
    fractions: list[float] = []
    result = accuracy.run(SMALL, source, ["sgd", "sam"], 2, journal, fractions.append)
    assert len(trained) == runs + 1  # the stopped run was trained twice
    assert len(set(trained)) == runs
    assert fractions[-1] == 1
    monkeypatch.setattr(accuracy, "train", None)  # no training is left
    again = accuracy.run(SMALL, source, ["sgd", "sam"], 2, accuracy.Journal(path))
    assert again.as_json() == result.as_json()
    other = replace(SMALL, epochs=3)
    assert accuracy.Journal(path).find(trials_of("sgd")[0], 0, other) is None


def test_validation_chooses_and_its_labels_are_noisy(tmp_path: Path) -> None:
    source = accuracy.load(SMALL, tmp_path)
    result = accuracy.run(SMALL, source, ["sgd"], 1, accuracy.Journal(None))
    (found,) = result.outcomes
    assert found.winner is found.trials[int(np.argmax(found.validation))]
    assert max(found.validation) < 0.75  # 36% of 337 labels are wrong; 4 standard deviations are 10%


def test_accuracy_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accuracy, "QUICK", (replace(SMALL, epochs=1), accuracy.FASHION))
    arguments = ["--quick", "--seeds", "1", "--method", "sgd", "--method", "interval", "--out", str(tmp_path)]
    assert main(["accuracy", *arguments, "--data-dir", str(tmp_path / "no")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out Fashion-MNIST, 6,000 images, 0% wrong labels" in said
    assert "train-images-idx3-ubyte.gz is missing" in said
    assert "minutes in all" in said
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "accuracy.json").read_text())["accuracy"]
    assert list(run["methods"]) == ["sgd", "interval"]
    assert len((folder / "accuracy.jsonl").read_text().splitlines()) == 5 + 5 + 2
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
