"""The accuracy and the cost of every method on real images, over several seeds.

The validation labels are as noisy as the training labels. The test labels are clean and choose nothing. On the first
seed every method tries five learning rates, with the middle one of three values of its own option (rho or another).
At the best rate it then tries the other two values. The best trial of all is trained on all seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import family
from bench.errors import BenchError
from bench.rounds import Progress, no_progress
from bench.tuning import Outcome, Train, compete
from fused_sam.demo import DemoError
from fused_sam.demo.data import CLASSES, Source, Task, load_digits, load_fashion_mnist, make_task
from fused_sam.demo.methods import Method
from fused_sam.demo.model import mlp
from fused_sam.demo.training import Curve, Run, Trial, batches, evaluate

FORWARD = 1 / 3  # of a pass, because the backward half costs twice the forward one
TUNING_SEEDS = 1
SUBSET_SEED = 0


@dataclass(frozen=True)
class Setting:
    """A data set with a share of wrong labels, and the length of the training."""

    data: str
    noise: float
    epochs: int
    batch_size: int
    validation_share: float
    images: int  # images of the training part that are used; 0 means all

    @property
    def title(self) -> str:
        name = {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}[self.data]
        part = f", {self.images:,} images" if self.images else ""
        return f"{name}{part}, {self.noise:.0%} wrong labels"


DIGITS = Setting("digits", 0.0, epochs=30, batch_size=64, validation_share=1 / 4, images=0)
FASHION = Setting("fashion-mnist", 0.0, epochs=12, batch_size=128, validation_share=1 / 6, images=6000)
SETTINGS = tuple(replace(setting, noise=noise) for setting in (DIGITS, FASHION) for noise in (0.0, 0.4))
QUICK = tuple(replace(replace(DIGITS, noise=noise), epochs=1) for noise in (0.0, 0.4))


@dataclass(frozen=True)
class FamilyTrial(Trial):
    """A trial of a method with its options, in the form that tuning takes."""

    options: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.method.label}, {self.text}"

    @property
    def text(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.options)


@dataclass(frozen=True)
class Finished(Run):
    """A finished run with its cost."""

    seconds: float  # spent in training steps
    passes: float  # forward and backward passes over the training data; a forward pass alone counts as a third


@dataclass(frozen=True)
class Result:
    """The outcomes of all methods on one setting."""

    setting: Setting
    outcomes: Sequence[Outcome]

    def runs(self, outcome: Outcome) -> list[Finished]:
        return [run for run in outcome.runs if isinstance(run, Finished)]

    def accuracies(self, outcome: Outcome) -> list[float]:
        """Return the test accuracies in percent, one per seed."""
        return [100 * run.test_accuracy for run in self.runs(outcome)]

    def mean(self, outcome: Outcome) -> float:
        return float(np.mean(self.accuracies(outcome)))

    def deviation(self, outcome: Outcome) -> float:
        """Return the standard deviation over the seeds; 0 for one seed."""
        values = self.accuracies(outcome)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def seconds(self, outcome: Outcome) -> float:
        """Return the seconds of training, the median over the seeds."""
        return float(np.median([run.seconds for run in self.runs(outcome)]))

    def passes(self, outcome: Outcome) -> float:
        return float(np.mean([run.passes for run in self.runs(outcome)]))

    def frontier(self) -> list[Outcome]:
        """Return the outcomes that no other one beats in both time and mean accuracy, cheapest first."""
        best, found = -math.inf, []
        for outcome in sorted(self.outcomes, key=lambda outcome: (self.seconds(outcome), -self.mean(outcome))):
            if self.mean(outcome) > best:
                best = self.mean(outcome)
                found.append(outcome)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds: accuracies in percent, times in seconds."""
        frontier = self.frontier()
        methods = {}
        for outcome in self.outcomes:
            methods[outcome.method.name] = {
                "label": outcome.method.label,
                "tried": [
                    {"options": options_of(trial), "validation": 100 * score}
                    for trial, score in zip(outcome.trials, outcome.validation, strict=True)
                ],
                "chosen": options_of(outcome.winner),
                "mean": self.mean(outcome), "deviation": self.deviation(outcome),
                "accuracies": self.accuracies(outcome),
                "seconds": self.seconds(outcome), "passes": self.passes(outcome), "frontier": outcome in frontier,
            }  # fmt: skip
        return {"setting": asdict(self.setting), "methods": methods}


def options_of(trial: Trial) -> dict[str, float]:
    assert isinstance(trial, FamilyTrial)
    return dict(trial.options)


class Journal:
    """A JSONL file with one line per finished run, from which a stopped benchmark resumes.

    A line counts for the same method, options, seed, setting and number of threads. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        text = path.read_text()
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.lines[key_of(entry["key"])] = entry["result"]
            except (ValueError, KeyError, TypeError):
                continue  # a killed run was writing this line; its trial runs again
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")

    def fraction(self, setting: Setting, runs: int) -> float:
        """Return the fraction of a setting's `runs` that the journal holds."""
        ours = {"threads": torch.get_num_threads(), **asdict(setting)}.items()
        return min(1.0, sum(ours <= json.loads(key).items() for key in self.lines) / runs)

    def find(self, trial: FamilyTrial, seed: int, setting: Setting) -> Finished | None:
        result = self.lines.get(key_of(keys(trial, seed, setting)))
        return None if result is None else finished(trial, seed, **result)

    def add(self, run: Finished, setting: Setting) -> None:
        if self.path is None:
            return
        assert isinstance(run.trial, FamilyTrial)
        result = {
            "validation": run.validation_accuracy, "test": run.test_accuracy, "loss": run.curve.test_loss[-1],
            "seconds": run.seconds, "passes": run.passes,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": keys(run.trial, run.seed, setting), "result": result}) + "\n")


def keys(trial: FamilyTrial, seed: int, setting: Setting) -> dict[str, Any]:
    return {
        "method": trial.method.name, "options": dict(trial.options), "seed": seed,
        "threads": torch.get_num_threads(), **asdict(setting),
    }  # fmt: skip


def key_of(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def finished(
    trial: FamilyTrial, seed: int, validation: float, test: float, loss: float, seconds: float, passes: float
) -> Finished:
    """Return a run without its course, which is not kept."""
    curve = Curve([round(passes)], [math.nan], [loss], [test], [validation])
    return Finished(trial, seed, curve, seconds, passes)


def trials_of(name: str, rates: Sequence[float], grid: Sequence[dict[str, float]]) -> list[FamilyTrial]:
    """Return trials of a method with each of its options at each learning rate."""
    method = family.METHODS[name]
    described = Method(name, method.label, method.label, method.stretch, math.ceil(method.passes))
    settings = [{"lr": lr, **options} for lr in rates for options in grid]
    return [FamilyTrial(described, s["lr"], s.get("rho"), tuple(s.items())) for s in settings]


def tuned(name: str, seeds: int, train: Train) -> Outcome:
    """Return a method's outcome on all seeds, at the best of its learning rates and options."""
    grid = family.METHODS[name].grid
    middle = grid[len(grid) // 2]
    (by_rate,) = compete([trials_of(name, family.RATES, [middle])], TUNING_SEEDS, TUNING_SEEDS, train)
    others = trials_of(name, [by_rate.winner.lr], [options for options in grid if options is not middle])
    (found,) = compete([[by_rate.winner, *others]], seeds, TUNING_SEEDS, train)
    validation = [*by_rate.validation, *found.validation[1:]]
    return replace(found, trials=[*by_rate.trials, *others], validation=validation)


def load(setting: Setting, folder: Path) -> Source:
    """Return the images that a setting uses.

    Raises:
        BenchError: Fashion-MNIST's files are not in the folder.
    """
    try:
        source = load_digits() if setting.data == "digits" else load_fashion_mnist(folder)
    except DemoError as error:
        raise BenchError(str(error)) from error
    if not setting.images:
        return source
    order = torch.randperm(len(source.images), generator=torch.Generator().manual_seed(SUBSET_SEED))
    return Source(source.images[order[: setting.images]], source.test)


def run(
    setting: Setting,
    source: Source,
    names: Sequence[str],
    seeds: int,
    journal: Journal,
    progress: Progress = no_progress,
) -> Result:
    """Return the outcomes of all methods on a setting, after training the runs that the journal lacks."""
    total, done = sum(count for _, count in runs_of(names, seeds)), 0

    @lru_cache(maxsize=1)  # the seeds follow one another
    def task(seed: int) -> Task:
        return make_task(source, seed, setting.noise, setting.validation_share)

    @cache  # the best learning rate is a trial again
    def train_one(trial: Trial, seed: int) -> Run:
        nonlocal done
        assert isinstance(trial, FamilyTrial)
        found = journal.find(trial, seed, setting)
        if found is None:
            found = train(task(seed), trial, seed, setting)
            journal.add(found, setting)
        done += 1
        progress(done / total)
        return found

    return Result(setting, [tuned(name, seeds, train_one) for name in names])


def train(task: Task, trial: FamilyTrial, seed: int, setting: Setting) -> Finished:
    """Train one run with a cosine schedule over its epochs; return it with the accuracies at its end."""
    epochs = setting.epochs * trial.method.stretch
    steps = math.ceil(len(task.train) / setting.batch_size)
    model = mlp(task.train.x.shape[1], CLASSES, seed)
    optimizer = family.METHODS[trial.method.name].build(model.parameters(), epochs * steps, **dict(trial.options))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    seconds = 0.0
    with counted(model) as count:
        for _ in range(epochs):
            for batch in batches(task.train, setting.batch_size, generator):
                start = perf_counter()
                family.step(model, optimizer, batch.x, batch.y)
                seconds += perf_counter() - start
            schedule.step()
    family.restore_clean_weights(optimizer)
    loss, test = evaluate(model, task.test)
    validation = evaluate(model, task.validation)[1]
    return finished(trial, seed, validation, test, loss, seconds, count[0] / len(task.train))


@contextmanager
def counted(model: nn.Module) -> Iterator[list[float]]:
    """Count the samples that go through the model; a forward pass without a graph counts as a third."""
    count = [0.0]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count[0] += len(args[0]) * (1.0 if torch.is_grad_enabled() else FORWARD)

    handle = model.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def runs_of(names: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """Return every method with the number of runs that it takes."""
    tried = {name: len(family.RATES) + len(family.METHODS[name].grid) - 1 for name in names}
    return [(name, tried[name] * TUNING_SEEDS + seeds - TUNING_SEEDS) for name in names]


def estimate(setting: Setting, source: Source, names: Sequence[str], seeds: int, journal: Journal) -> float:
    """Return the seconds that a setting's missing runs take, estimated from one short trial of SGD."""
    task = make_task(source, 0, setting.noise, setting.validation_share)
    trial = trials_of("sgd", family.RATES, [{}])[0]
    train(task, trial, 0, replace(setting, epochs=1))  # lets threads settle
    short = train(task, trial, 0, replace(setting, epochs=1))
    passes = sum(
        count * family.METHODS[name].passes * family.METHODS[name].stretch for name, count in runs_of(names, seeds)
    )
    missing = 1 - journal.fraction(setting, sum(count for _, count in runs_of(names, seeds)))
    return passes * short.seconds * setting.epochs * missing
