"""This module trains every optimizer at every learning rate, and chooses rho on the validation split.

One rho serves all learning rates of SAM: the one with the highest accuracy on the (noisy) validation labels after the
last epoch, mean over the learning rates on seed 0. Test labels choose nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch

from .data import Source, Task, load_digits, load_fashion_mnist, make_task
from .methods import Method
from .training import Run, Trial, train

TUNING_SEED = 0


@dataclass(frozen=True)
class Job:
    """Holds all that a run depends on, so that any process can make it."""

    data: str
    data_dir: Path
    validation_share: float
    noise: float
    epochs: int
    batch_size: int
    widths: tuple[int, ...]
    backend: str
    trial: Trial
    seed: int

    @property
    def passes(self) -> int:
        """The passes over the training data that the run takes."""
        return self.trial.method.cost(self.epochs)


@dataclass(frozen=True)
class Result:
    """Holds the runs of one optimizer at one noise level."""

    method: Method
    noise: float
    rho: float | None
    scores: dict[float, float]  # validation accuracy of every rho that was tried; empty where there was no choice
    runs: dict[float, list[Run]]  # for each learning rate, one run per seed


@lru_cache(maxsize=1)
def source_of(data: str, folder: Path) -> Source:
    """Return a data set, read once by each process."""
    return load_digits() if data == "digits" else load_fashion_mnist(folder)


@lru_cache(maxsize=1)
def task_of(data: str, folder: Path, seed: int, noise: float, validation_share: float) -> Task:
    """Return the splits of a seed, made once in a row of jobs that share them."""
    return make_task(source_of(data, folder), seed, noise, validation_share)


def run_job(job: Job) -> Run:
    """Return the run of a job."""
    task = task_of(job.data, job.data_dir, job.seed, job.noise, job.validation_share)
    return train(
        task,
        job.trial,
        job.seed,
        epochs=job.epochs,
        batch_size=job.batch_size,
        widths=job.widths,
        backend=job.backend,
    )


Runner = Callable[[Sequence[Job]], list[Run]]


@contextmanager
def runner(processes: int, on_run: Callable[[Job], None]) -> Iterator[Runner]:
    """Yield a function that makes the runs of jobs, in processes of one thread each; 1 stays in this process."""
    if processes == 1:

        def here(jobs: Sequence[Job]) -> list[Run]:
            runs = []
            for job in jobs:
                runs.append(run_job(job))
                on_run(job)
            return runs

        yield here
        return
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )

    def there(jobs: Sequence[Job]) -> list[Run]:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            on_run(futures[future])
        return [future.result() for future in futures]

    try:
        yield there
    finally:
        pool.shutdown(cancel_futures=True)


def tuning_jobs(job: Job, method: Method, lrs: Iterable[float], rhos: Sequence[float]) -> list[Job]:
    """Return the jobs that choose rho; none for SGD and for a single rho. `job` gives the other fields."""
    if not method.is_sam or len(rhos) == 1:
        return []
    return [replace(job, trial=Trial(method, lr, rho), seed=TUNING_SEED) for rho in rhos for lr in lrs]


def final_jobs(job: Job, method: Method, lrs: Iterable[float], rho: float | None, seeds: int) -> list[Job]:
    """Return the jobs of all learning rates and seeds; seed by seed, so that the splits are made once."""
    return [replace(job, trial=Trial(method, lr, rho), seed=seed) for seed in range(seeds) for lr in lrs]


def sweep(
    job: Job, methods: Sequence[Method], lrs: Sequence[float], rhos: Sequence[float], seeds: int, run: Runner
) -> list[Result]:
    """Return the results of all methods at one noise level. `job` gives the fields that they share."""
    tuning = [trial for method in methods for trial in tuning_jobs(job, method, lrs, rhos)]
    plain = [trial for m in methods if not m.is_sam for trial in final_jobs(job, m, lrs, None, seeds)]
    known = dict(zip([*tuning, *plain], run([*tuning, *plain]), strict=True))
    results = []
    for method in methods:
        scores = {}
        for rho in rhos if method.is_sam and tuning else ():
            tried = [known[replace(job, trial=Trial(method, lr, rho), seed=TUNING_SEED)] for lr in lrs]
            scores[rho] = statistics.fmean(r.validation_accuracy for r in tried)
        best = max(scores, key=lambda rho: scores[rho]) if scores else rhos[0]
        chosen = best if method.is_sam else None
        jobs = final_jobs(job, method, lrs, chosen, seeds)
        missing = [j for j in jobs if j not in known]
        known.update(zip(missing, run(missing), strict=True))
        runs = {lr: [known[j] for j in jobs if j.trial.lr == lr] for lr in lrs}
        results.append(Result(method, job.noise, chosen, scores, runs))
    return results


def passes_of(job: Job, methods: Sequence[Method], lrs: Sequence[float], rhos: Sequence[float], seeds: int) -> int:
    """Return the passes over the data that a sweep makes."""
    total = 0
    for method in methods:
        tuning = tuning_jobs(job, method, lrs, rhos)
        final = final_jobs(job, method, lrs, rhos[0] if method.is_sam else None, seeds)
        again = set(tuning) & set(final)  # seed 0 of the chosen rho is not trained twice
        total += sum(j.passes for j in tuning) + sum(j.passes for j in final if j not in again)
    return total
