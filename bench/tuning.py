"""This module runs every optimizer's trials, and chooses the winner of each on the validation split.

Every trial of an optimizer is trained on the first seeds. The one with the best mean accuracy on the (noisy) validation
labels is trained on the other seeds too. Test labels do not enter the choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fused_sam.demo.methods import Method
from fused_sam.demo.training import Run, Trial

Train = Callable[[Trial, int], Run]  # trains a trial with a seed


@dataclass(frozen=True)
class Outcome:
    """Holds an optimizer's trials and the runs of the winning trial."""

    trials: Sequence[Trial]
    validation: Sequence[float]  # accuracy of each trial, mean over the tuning seeds
    winner: Trial
    runs: Sequence[Run]  # of the winner, one per seed

    @property
    def method(self) -> Method:
        """The method of all trials."""
        return self.winner.method


def compete(grids: Sequence[Sequence[Trial]], seeds: int, tuning_seeds: int, train: Train) -> list[Outcome]:
    """Train every grid of trials, and the winners on all seeds; return one outcome per grid.

    The order is seed by seed, so that a slow moment of the machine affects all optimizers.
    """
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
