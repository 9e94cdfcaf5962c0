"""Which trials are run, and which of an optimizer's trials wins on the validation split.

Every trial of an optimizer is trained on the first seeds; the one with the best mean accuracy on the (noisy) validation
labels is trained on the other seeds too. Test labels have no part in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .methods import Method
from .training import Run, Trial

Train = Callable[[Trial, int], Run]  # of a trial and a seed


@dataclass(frozen=True)
class Outcome:
    """What an optimizer reached, at the trial that won."""

    trials: Sequence[Trial]
    validation: Sequence[float]  # of each trial, mean over the tuning seeds
    winner: Trial
    runs: Sequence[Run]  # of the winner, one a seed

    @property
    def method(self) -> Method:
        return self.winner.method


def trials_of(method: Method, lrs: Sequence[float], rhos: Sequence[float]) -> list[Trial]:
    grid: Sequence[float | None] = rhos if method.climbs else (None,)
    return [Trial(method, lr, rho) for lr in lrs for rho in grid]


def passes_over_data(grid: Sequence[Trial], epochs: int, seeds: int, tuning_seeds: int) -> int:
    """Of all runs of one grid: what the search and the winner's other seeds cost."""
    tuned = min(seeds, tuning_seeds)
    return grid[0].method.cost(epochs) * (len(grid) * tuned + seeds - tuned)


def compete(grids: Sequence[Sequence[Trial]], seeds: int, tuning_seeds: int, train: Train) -> list[Outcome]:
    """Train every grid of trials, seed by seed, so that a slow moment of the machine hits all optimizers."""
    runs: dict[Trial, list[Run]] = {trial: [] for grid in grids for trial in grid}
    tuned = min(seeds, tuning_seeds)
    for seed in range(tuned):
        for trial in runs:
            runs[trial].append(train(trial, seed))
    scores = {trial: statistics.fmean(run.validation_accuracy for run in runs[trial]) for trial in runs}
    winners = [max(grid, key=lambda trial: scores[trial]) for grid in grids]
    for seed in range(tuned, seeds):
        for trial in winners:
            runs[trial].append(train(trial, seed))
    return [
        Outcome(grid, [scores[trial] for trial in grid], winner, runs[winner])
        for grid, winner in zip(grids, winners, strict=True)
    ]
