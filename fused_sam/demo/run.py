"""This module runs the demo in order: data, an estimate, training under a progress bar, the timing, the report."""

from __future__ import annotations

import math
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .data import CLASSES, Task
from .figure import draw
from .methods import METHODS, Method
from .model import mlp
from .options import Settings
from .report import content, noise_table, protocol, results_table, versus_table, write_json
from .summary import chosen_lr, sentences
from .sweep import Job, passes_of, runner, sweep, task_of
from .training import Trial, batches, evaluate, make_optimizer, step
from .versus import compare

PROBE_SECONDS = 1.0  # of steps for the estimate, because the first ones are slow


def run(settings: Settings) -> None:
    """Train, print the tables, and write the figure and the JSON file.

    Raises:
        DemoError: the data set's files are missing or broken.
    """
    console = Console()
    job = first_job(settings)
    task = task_of(job.data, job.data_dir, job.seed, job.noise, job.validation_share)
    passes = len(settings.noises) * passes_of(job, *sweep_of(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        announce(console, settings, task, passes * seconds_per_pass(settings, task) / settings.processes)
        by_noise = []
        with progress_bar(console) as progress:
            bar = progress.add_task("starting", total=passes)

            def advance(done: Job) -> None:
                noise = f"{done.noise:.0%} wrong, " if len(settings.noises) > 1 else ""
                progress.update(bar, advance=done.passes, description=f"{noise}{done.trial}, seed {done.seed}")

            with runner(settings.processes, advance) as run_jobs:
                for noise in settings.noises:
                    by_noise.append(sweep(first_job(settings, noise), *sweep_of(settings), run_jobs))
            progress.update(bar, description="trained")
    finally:
        torch.set_num_threads(threads)

    for results in by_noise:
        console.print(results_table(results, settings))
    if len(by_noise) > 1:
        console.print(noise_table(by_noise))
    sam = next((result for result in by_noise[0] if result.method.is_sam), None)
    versus = None
    if sam is not None:
        trial = Trial(sam.method, chosen_lr(sam), sam.rho)
        versus = compare(task, trial, settings.batch_size, settings.preset.widths, settings.backend)
        console.print(versus_table(versus))
    draw(settings.output, by_noise, settings.data)
    if settings.json is not None:
        write_json(settings.json, content(settings, by_noise, versus))
    console.print(protocol(settings), highlight=False, soft_wrap=True)
    console.print(f"Curves: {settings.output}", highlight=False, soft_wrap=True)
    for results in by_noise:
        start = f"{results[0].noise:.0%} wrong labels. " if len(by_noise) > 1 else ""
        for sentence in sentences(results):
            console.print(start + sentence, highlight=False, soft_wrap=True)


def first_job(settings: Settings, noise: float | None = None) -> Job:
    """Return a job with everything that the runs of one noise level share."""
    return Job(
        data=settings.data,
        data_dir=settings.data_dir,
        validation_share=settings.preset.validation_share,
        noise=settings.noises[0] if noise is None else noise,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        widths=settings.preset.widths,
        backend=settings.backend,
        trial=Trial(METHODS["sgd"], settings.lrs[0], None),
        seed=0,
    )


def sweep_of(settings: Settings) -> tuple[tuple[Method, ...], tuple[float, ...], tuple[float, ...], int]:
    """Return methods, learning rates, rhos and the number of seeds, as sweep() takes them."""
    return settings.methods, settings.lrs, settings.rhos, settings.seeds


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


def announce(console: Console, settings: Settings, task: Task, seconds: float) -> None:
    """Print what the demo will do and about how long it takes."""
    levels = ", ".join(f"{noise:.0%}" for noise in settings.noises)
    lines = [
        f"{settings.data}: {len(task.train):,} images to train on, {len(task.validation):,} to validate on, "
        f"{len(task.test):,} to test on.",
        f"{levels} of the training and validation labels are replaced at random, but no test labels.",
        f"About {readable(seconds)} in {settings.processes} process{'es' if settings.processes > 1 else ''}, "
        "more while the machine is busy.",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def seconds_per_pass(settings: Settings, task: Task) -> float:
    """Return the duration of one gradient pass over the training data and an evaluation, from a few steps of SGD."""
    trial = Trial(METHODS["sgd"], settings.lrs[0], None)
    model = mlp(task.train.x.shape[1], CLASSES, 0, settings.preset.widths)
    optimizer = make_optimizer(model, trial, settings.backend)
    batch = next(batches(task.train, settings.batch_size, torch.Generator()))
    fastest, end = math.inf, perf_counter() + PROBE_SECONDS
    while perf_counter() < end:
        fastest = min(fastest, step(model, optimizer, batch)[1].total)
    start = perf_counter()
    evaluate(model, task.test)
    evaluate(model, task.validation)
    evaluation = perf_counter() - start
    steps = math.ceil(len(task.train) / settings.batch_size)
    return steps * fastest + evaluation


def readable(seconds: float) -> str:
    """Return a duration as text, in minutes from 120 seconds on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
