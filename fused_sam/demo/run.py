"""This module runs the demo in order: data, an estimate, training under a progress bar, the timing, the report."""

from __future__ import annotations

import math
from functools import lru_cache
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .data import CLASSES, Source, Task, load_digits, load_fashion_mnist, make_task
from .figure import draw
from .methods import METHODS
from .model import mlp
from .options import Settings
from .report import closing_sentence, results_table, versus_table, write_json
from .training import Run, Trial, batches, evaluate, make_optimizer, step, train
from .tuning import compete, passes_over_data, trials_of
from .versus import compare

PROBE_SECONDS = 1.0  # of steps for the estimate, because threads take a while to settle on their cores


def run(settings: Settings) -> None:
    """Train, print the tables, and write the figure and the JSON file.

    Raises:
        DemoError: the data set's files are missing or broken.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    console = Console()
    source = load(settings)
    grids = [
        trials_of(method, settings.sam_lrs if method.is_sam else settings.sgd_lrs, settings.rhos)
        for method in settings.methods
    ]
    tuning_seeds = min(settings.seeds, settings.preset.tuning_seeds)

    @lru_cache(maxsize=1)  # the seeds come one after the other
    def task(seed: int) -> Task:
        return make_task(source, seed, settings.noise, settings.preset.validation_share)

    passes = sum(passes_over_data(grid, settings.epochs, settings.seeds, tuning_seeds) for grid in grids)
    announce(console, settings, task(0), grids, tuning_seeds, passes)

    with progress_bar(console) as progress:
        bar = progress.add_task("", total=passes)

        def train_one(trial: Trial, seed: int) -> Run:
            progress.update(bar, description=f"{trial}, seed {seed}")
            return train(
                task(seed),
                trial,
                seed,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                backend=settings.backend,
                on_epoch=lambda passes: progress.advance(bar, passes),
            )

        outcomes = compete(grids, settings.seeds, tuning_seeds, train_one)
        progress.update(bar, description="trained")

    console.print(results_table(outcomes, settings.epochs))
    sam = next((outcome for outcome in outcomes if outcome.method.is_sam), None)
    versus = None
    if sam is not None:
        versus = compare(task(0), sam.winner, settings.batch_size, settings.backend)
        console.print(versus_table(versus))
    draw(settings.output, outcomes, settings.data, settings.noise)
    if settings.json is not None:
        write_json(settings.json, settings, outcomes, versus)
    console.print(f"Curves: {settings.output}", highlight=False, soft_wrap=True)
    console.print(closing_sentence(outcomes), highlight=False, soft_wrap=True)


def load(settings: Settings) -> Source:
    """Return the data set that the settings name."""
    return load_digits() if settings.data == "digits" else load_fashion_mnist(settings.data_dir)


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that counts gradient passes."""
    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )


def announce(
    console: Console, settings: Settings, task: Task, grids: list[list[Trial]], tuning_seeds: int, passes: int
) -> None:
    """Print what the demo will do and about how long it takes."""
    lines = [
        f"{settings.data}: {len(task.train):,} images to train on, {len(task.validation):,} to validate on, "
        f"{len(task.test):,} to test on.",
        f"{settings.noise:.0%} of the training and validation labels are replaced at random, but no test labels.",
    ]
    if max(map(len, grids)) > 1:
        counts = ", ".join(f"{len(grid)} of {grid[0].method.phrase}" for grid in grids)
        lines.append(
            f"Learning rate and rho are chosen on {plural(tuning_seeds, 'seed')} among {counts};\n"
            f"the chosen ones are trained on {plural(settings.seeds, 'seed')}."
        )
    duration = readable(passes * seconds_per_pass(settings, task))
    threads = plural(torch.get_num_threads(), "thread")
    lines.append(f"About {duration} with {threads}, more while the machine is busy.")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def seconds_per_pass(settings: Settings, task: Task) -> float:
    """Return the duration of one gradient pass over the training data and an evaluation, from a few steps of SGD."""
    trial = Trial(METHODS["sgd"], settings.sgd_lrs[0], None)
    model = mlp(task.train.x.shape[1], CLASSES, seed=0)
    optimizer = make_optimizer(model, trial, settings.backend)
    batch = next(batches(task.train, settings.batch_size, torch.Generator()))
    fastest, end = math.inf, perf_counter() + PROBE_SECONDS
    while perf_counter() < end:
        fastest = min(fastest, step(model, optimizer, batch)[1].total)
    start = perf_counter()
    evaluate(model, task.test)
    evaluation = perf_counter() - start
    steps = math.ceil(len(task.train) / settings.batch_size)
    return steps * fastest + evaluation


def plural(count: int, noun: str) -> str:
    """Return the count and the noun, in the plural unless the count is 1."""
    return f"{count} {noun}" + "s" * (count != 1)


def readable(seconds: float) -> str:
    """Return a duration as text, in minutes from 120 seconds on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
