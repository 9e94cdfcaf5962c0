"""Tests of `python -m fused_sam demo`: its data, its choice of rho, its errors, and a small run from end to end."""

from __future__ import annotations

import gzip
import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fused_sam

typer = pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result  # noqa: E402

from fused_sam.demo import DemoError  # noqa: E402
from fused_sam.demo.cli import demo  # noqa: E402
from fused_sam.demo.data import (  # noqa: E402
    FASHION_FILES,
    Source,
    load_digits,
    load_fashion_mnist,
    make_task,
    replace_labels,
)
from fused_sam.demo.idx import read_idx  # noqa: E402
from fused_sam.demo.methods import METHODS  # noqa: E402
from fused_sam.demo.model import mlp  # noqa: E402
from fused_sam.demo.presets import PRESETS  # noqa: E402
from fused_sam.demo.summary import chosen_lr, last, middle_lr, sentences, stopped  # noqa: E402
from fused_sam.demo.sweep import Job, passes_of, run_job, runner, sweep  # noqa: E402
from fused_sam.demo.sweep import Result as Sweep  # noqa: E402
from fused_sam.demo.training import Curve, Run, Trial, batches, step  # noqa: E402
from fused_sam.demo.unfused import UnfusedSAM  # noqa: E402

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
application.command()(demo)


def run_demo(*words: object) -> Result:
    return CliRunner().invoke(application, [str(word) for word in words], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Set one thread. A small network is not faster with more, and threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Source:
    return load_digits()


# ---- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_exactly_the_given_share_of_labels_is_replaced(share: float) -> None:
    labels = torch.full((1003,), 12)  # a class that no replacement has
    noisy, replaced = replace_labels(labels, share, torch.Generator().manual_seed(1))
    changed = (noisy != labels).nonzero().flatten()
    assert len(changed) == round(share * 1003)
    assert torch.equal(changed, replaced.sort().values)


def test_replacements_are_uniform_over_all_classes() -> None:
    noisy, _ = replace_labels(torch.zeros(20_000, dtype=torch.int64), 1.0, torch.Generator().manual_seed(0))
    counts = torch.bincount(noisy, minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200


def test_only_training_and_validation_labels_have_noise(digits: Source) -> None:
    clean, noisy = (make_task(digits, 3, noise, 0.25) for noise in (0.0, 0.4))
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(clean, part).x, getattr(noisy, part).x), "the splits depend on the noise"
    assert torch.equal(clean.test.y, noisy.test.y)
    for part in ("train", "validation"):
        before, after = getattr(clean, part).y, getattr(noisy, part).y
        changed = int((before != after).sum())
        # A tenth of the replaced labels get the class that they had.
        assert 0.3 * len(before) < changed <= round(0.4 * len(before))


def test_splits_cover_every_image_once_and_training_pixels_are_standardised(digits: Source) -> None:
    task = make_task(digits, 0, 0.4, 0.25)
    assert (len(task.train), len(task.validation), len(task.test)) == (1011, 337, 449)
    together = torch.cat([task.train.x, task.validation.x, task.test.x])
    assert len(together.unique(dim=0)) == len(digits.images.x.unique(dim=0))
    assert task.train.x.mean().abs() < 1e-5 and (task.train.x.std() - 1).abs() < 1e-5


def test_a_seed_gives_the_same_data_and_another_seed_other_data(digits: Source) -> None:
    first, again, other = (make_task(digits, seed, 0.4, 0.25) for seed in (5, 5, 6))
    assert torch.equal(first.train.x, again.train.x) and torch.equal(first.train.y, again.train.y)
    assert not torch.equal(first.train.x, other.train.x)


# ---- IDX files ----------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray, kind: int = 0x08) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_bytes(array)))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Return a folder of four valid files, with 60 and 20 images of 4 x 3 pixels."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        images, labels = FASHION_FILES[part]
        write_idx(folder / images, random.integers(0, 256, (count, 4, 3), dtype=np.uint8))
        write_idx(folder / labels, (np.arange(count) % 10).astype(np.uint8))
    return folder


def test_idx_files_are_read_in_row_order(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "images.gz", array)
    assert np.array_equal(read_idx(tmp_path / "images.gz", 3).numpy(), array)


def test_fashion_mnist_keeps_its_own_test_part(fashion: Path) -> None:
    source = load_fashion_mnist(fashion)
    assert source.test is not None
    assert source.images.x.shape == (60, 12) and source.test.x.shape == (20, 12)
    task = make_task(source, 0, 0.4, 1 / 6)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 10, 20)
    assert torch.equal(task.test.y, source.test.y)


GOOD = gzip.compress(idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)))
BROKEN = {
    "truncated gzip": (GOOD[:-12], "truncated"),
    "no gzip": (b"hello, this is no gzip file", "not a gzip"),
    "a bit flipped": (GOOD[:20] + bytes((GOOD[20] ^ 0x10,)) + GOOD[21:], ""),
    "empty": (b"", "wrong file"),
    "labels for images": (gzip.compress(idx_bytes(np.arange(24, dtype=np.uint8))), "wrong file"),
    "floats": (gzip.compress(idx_bytes(np.zeros((2, 3, 4), np.uint8), kind=0x0D)), "wrong file"),
    "header cut": (gzip.compress(bytes((0, 0, 8, 3, 0, 0))), "truncated"),
    "fewer bytes than the header says": (gzip.compress(gzip.decompress(GOOD)[:-1]), "header says"),
    "more bytes than the header says": (gzip.compress(gzip.decompress(GOOD) + b"x"), "header says"),
    "no images": (gzip.compress(idx_bytes(np.zeros((0, 3, 4), np.uint8))), "header says"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_error_of_a_broken_idx_file_names_file_and_mistake(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DemoError) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value) and words in str(error.value)


def test_images_and_labels_of_different_numbers_are_an_error(fashion: Path) -> None:
    labels = fashion / FASHION_FILES["train"][1]
    write_idx(labels, np.zeros(59, np.uint8))
    with pytest.raises(DemoError, match=r"60 images.*59 labels"):
        load_fashion_mnist(fashion)
    write_idx(labels, np.full(60, 10, np.uint8))
    with pytest.raises(DemoError, match="label 10; expected 0 to 9"):
        load_fashion_mnist(fashion)


# ---- training and choosing ----------------------------------------------------------------------------------


def test_the_unfused_peer_takes_the_steps_of_fused_sam(digits: Source) -> None:
    task = make_task(digits, 0, 0.4, 0.25)
    models = [mlp(64, 10, seed=1) for _ in range(2)]
    options = {"rho": 0.3, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    peers = (fused_sam.SAM(models[0].parameters(), **options), UnfusedSAM(models[1].parameters(), **options))
    for batch in batches(task.train, 256, torch.Generator().manual_seed(0)):
        for model, optimizer in zip(models, peers, strict=True):
            step(model, optimizer, batch)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def small_job(name: str = "sam", lr: float = 0.02, rho: float = 0.1, seed: int = 0, epochs: int = 2) -> Job:
    trial = Trial(METHODS[name], lr, rho if METHODS[name].is_sam else None)
    return Job("digits", Path("."), 0.25, 0.4, epochs, 256, (32,), "auto", trial, seed)


@pytest.mark.parametrize("name", METHODS)
def test_a_job_gives_the_same_run_and_its_cost_is_counted_in_passes(name: str) -> None:
    job = small_job(name)
    torch.manual_seed(99)
    first = run_job(job)
    torch.manual_seed(7)
    again = run_job(job)
    assert first.curve == again.curve
    assert first.curve.passes[-1] == job.passes == (2 if name == "sgd" else 4)


def test_the_curve_of_a_short_run_begins_that_of_a_long_one() -> None:
    short, long = run_job(small_job(epochs=1)), run_job(small_job(epochs=3))
    assert short.curve.test_accuracy == long.curve.test_accuracy[:1]
    assert short.curve.validation_accuracy == long.curve.validation_accuracy[:1]


def test_processes_give_the_runs_of_one_process() -> None:
    jobs = [small_job("sgd"), small_job("sam", seed=1), small_job("sam")]
    done: list[Job] = []
    with runner(1, done.append) as here:
        expected = here(jobs)
    with runner(2, done.append) as there:
        assert there(jobs) == expected
    assert sorted(map(str, done)) == sorted(map(str, jobs + jobs))


def fake_run(job: Job, validation: list[float], test: list[float]) -> Run:
    count = len(test)
    return Run(job.trial, job.seed, Curve(list(range(1, count + 1)), [1.0] * count, [1.0] * count, test, validation))


def test_validation_chooses_rho_and_test_accuracy_does_not() -> None:
    asked: list[Job] = []

    def pretend(jobs: Sequence[Job]) -> list[Run]:
        asked.extend(jobs)
        good = [job.trial.rho == 0.2 for job in jobs]
        return [
            fake_run(job, [0.6 if is_good else 0.5], [0.1 if is_good else 0.99])
            for job, is_good in zip(jobs, good, strict=True)
        ]

    methods = [METHODS["sgd"], METHODS["sam"]]
    lrs, rhos, seeds = (0.1, 0.3), (0.1, 0.2, 0.3), 4
    job = small_job(epochs=5)
    sgd, sam = sweep(job, methods, lrs, rhos, seeds, pretend)
    assert sam.rho == 0.2 and sgd.rho is None
    assert sam.scores == {0.1: 0.5, 0.2: 0.6, 0.3: 0.5} and sgd.scores == {}
    assert [run.seed for run in sam.runs[0.3]] == [0, 1, 2, 3]
    assert len(asked) == len(set(asked)), "a run was made twice"
    assert passes_of(job, methods, lrs, rhos, seeds) == sum(job.passes for job in asked)


def test_early_stopping_takes_the_epoch_and_the_rate_of_the_best_validation_accuracy() -> None:
    slow, fast = small_job("sgd", lr=0.1), small_job("sgd", lr=0.3)
    result = Sweep(
        METHODS["sgd"], 0.4, None, {},
        {
            0.1: [fake_run(slow, [0.5, 0.7, 0.7, 0.6], [0.1, 0.2, 0.9, 0.3])],
            0.3: [fake_run(fast, [0.4, 0.4, 0.6, 0.5], [0.9, 0.9, 0.9, 0.5])],
        },
    )  # fmt: skip
    assert chosen_lr(result) == 0.1
    assert stopped(result) == [20.0] and stopped(result, 0.3) == [90.0]
    assert last(result) == [pytest.approx(40.0)] and last(result, 0.3) == [50.0]
    assert middle_lr(result) == 0.3


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_tries_five_learning_rates_in_order(preset) -> None:  # type: ignore[no-untyped-def]
    assert len(preset.lrs) == 5 and list(preset.lrs) == sorted(preset.lrs)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([1.0, 1.1, 0.9], "SAM is 1.0 ± 0.1 points ahead of SGD."),
        ([-1.0, -1.1, -0.9], "SAM is 1.0 ± 0.1 points behind SGD."),
        ([1.0, -1.0, 0.3], "SAM is not clearly apart from SGD (+0.1 ± 0.6 points)."),
        ([0.0, 0.0, 0.0], "not clearly apart"),
        ([-2.0], "2.0 points behind SGD on the one seed."),
    ],
)
def test_the_headline_states_both_results(gains: list[float], words: str) -> None:
    def result(name: str, tests: list[float]) -> Sweep:
        runs = [fake_run(small_job(name, seed=i), [0.9, 0.5], [0.8, test]) for i, test in enumerate(tests)]
        return Sweep(METHODS[name], 0.4, None, {}, {0.1: runs})

    to_the_end, with_help = sentences(
        [result("sgd", [0.8] * len(gains)), result("sam", [0.8 + gain / 100 for gain in gains])]
    )
    assert to_the_end.startswith("Trained to the last epoch") and words in to_the_end
    assert with_help.startswith("With epoch chosen on the validation split") and "0.0" in with_help


# ---- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rho", "-0.1"], "--rho"),
        (["--rho", "nan"], "--rho"),
        (["--rho", "0.1,inf"], "--rho"),
        (["--rho", "0.1,,0.2"], "--rho"),
        (["--rho", "much"], "--rho"),
        (["--lr", "0"], "--lr"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "2.5"], "--epochs"),
        (["--seeds", "-1"], "--seeds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--processes", "0"], "--processes"),
        (["--processes", "99999999999"], "--processes"),
        (["--noise", "0.2,2"], "--noise"),
        (["--noise", "1.01"], "--noise"),
        (["--noise", "-0.1"], "--noise"),
        (["--noise", "nan"], "--noise"),
        (["--data", "cifar"], "--data"),
        (["--data-dir", "."], "--data-dir"),
        (["--data", "fashion-mnist", "--data-dir", "no/such/folder"], "--data-dir"),
        (["--optimizer", "adam"], "--optimizer"),
        (["--optimizer", ""], "--optimizer"),
        (["--backend", "warp"], "--backend"),
        (["--output", "no/such/folder/x.png"], "--output"),
        (["--output", "curves.txt"], "--output"),
        (["--output", "folder.png"], "--output"),
        (["--json", "no/such/folder/x.json"], "--json"),
        (["--output", "a.png", "--json", "./a.png"], "--json"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_in_one_line_that_names_the_option(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    result = run_demo(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and named in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"], "left something behind"


def test_a_truncated_data_file_ends_in_one_line(fashion: Path, tmp_path: Path) -> None:
    images = fashion / FASHION_FILES["train"][0]
    images.write_bytes(images.read_bytes()[:-20])
    result = run_demo("--data", "fashion-mnist", "--data-dir", fashion, "--output", tmp_path / "x.png")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and images.name in result.stderr and "truncated" in result.stderr


def test_a_small_run_prints_the_tables_and_writes_figure_and_json(tmp_path: Path) -> None:
    figure, numbers = tmp_path / "curves.png", tmp_path / "numbers.json"
    options = ["--seeds", 1, "--epochs", 2, "--rho", 0.1, "--lr", 0.05, "--batch-size", 256, "--processes", 1]
    result = run_demo(*options, "--output", figure, "--json", numbers)
    assert result.exit_code == 0, result.output
    for words in ("SGD ", "SGD, 2x epochs", "SAM  ", " 0.1 ", "fused (", "public package", "Trained to the last epoch"):
        assert words in result.stdout, words
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 20_000

    content = json.loads(numbers.read_text())
    (level,) = content["levels"]
    assert level["noise"] == 0.4
    assert [optimizer["optimizer"] for optimizer in level["optimizers"]] == list(METHODS)
    assert [optimizer["passes"] for optimizer in level["optimizers"]] == [2, 4, 4]
    for optimizer in level["optimizers"]:
        (run,) = optimizer["runs"]
        assert 0 <= run["curve"]["test_accuracy"][-1] <= 1 and math.isfinite(run["curve"]["train_loss"][-1])
        assert optimizer["last"] == [pytest.approx(100 * run["curve"]["test_accuracy"][-1])]
    assert content["times"]["over_sgd"]["fused"]["median"] > 1
    for sentence in level["conclusion"]:
        assert sentence in result.stdout
    assert content["protocol"] in result.stdout


def test_several_noise_levels_get_a_table_each_and_one_together(tmp_path: Path) -> None:
    result = run_demo(
        "--seeds", 2, "--epochs", 1, "--rho", "0.1", "--lr", "0.02,0.1", "--batch-size", 256, "--processes", 1,
        "--noise", "0,0.6", "--output", tmp_path / "x.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("digits, 0% wrong labels", "digits, 60% wrong labels", "Over the noise", "60% wrong labels. With"):
        assert words in result.stdout, words


def test_fashion_mnist_runs_from_its_files_with_only_the_chosen_optimizers(fashion: Path, tmp_path: Path) -> None:
    result = run_demo(
        "--data", "fashion-mnist", "--data-dir", fashion, "--optimizer", "sgd", "--optimizer", "sgd-2x",
        "--seeds", 2, "--epochs", 1, "--lr", "0.01,0.1", "--batch-size", 16, "--output", tmp_path / "x.svg",
        "--processes", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "SAM" not in result.stdout and "SGD with twice the epochs reaches" in result.stdout
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_training_that_diverges_is_reported_and_json_stays_valid(fashion: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    result = run_demo(
        "--data", "fashion-mnist", "--data-dir", fashion, "--seeds", 1, "--epochs", 3, "--lr", 1e20, "--rho", 0.1,
        "--batch-size", 16, "--output", tmp_path / "x.png", "--json", numbers, "--processes", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "NaN" not in numbers.read_text()
    json.loads(numbers.read_text())


def test_the_package_itself_needs_none_of_the_demos_packages() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'matplotlib', 'rich', 'typer']));"
        "import fused_sam, fused_sam.demo; from fused_sam.__main__ import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install 'fused_sam[demo]'" in done.stderr
