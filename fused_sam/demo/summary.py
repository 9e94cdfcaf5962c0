"""This module sums up a sweep: what training to the last epoch gives, and what early stopping gives.

    last:     accuracy after the last epoch, mean over all learning rates
    stopped:  accuracy at the learning rate and the epoch that the validation split chooses

Both are accuracies on clean test labels in percent, one value per seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .methods import METHODS
from .sweep import Result

# A mean difference of more than this number of standard errors counts as a win or a loss.
SIGNIFICANT_ERRORS = 2.0


def last(result: Result, lr: float | None = None) -> list[float]:
    """Return the accuracy after the last epoch, at one learning rate or as the mean over all; one value per seed."""
    runs = list(result.runs.values()) if lr is None else [result.runs[lr]]
    return [100 * statistics.fmean(run.test_accuracy for run in of_seed) for of_seed in zip(*runs, strict=True)]


def stopped(result: Result, lr: float | None = None) -> list[float]:
    """Return the accuracy after the epoch that validation chooses, at one learning rate or the chosen one."""
    return [100 * run.stopped_accuracy for run in result.runs[chosen_lr(result) if lr is None else lr]]


def chosen_lr(result: Result) -> float:
    """Return the learning rate with the best validation accuracy at the stopped epochs, mean over the seeds."""
    return max(
        result.runs,
        key=lambda lr: statistics.fmean(r.curve.validation_accuracy[r.best_epoch] for r in result.runs[lr]),
    )


def middle_lr(result: Result) -> float:
    """Return the middle learning rate, whose curves the figure shows."""
    rates = sorted(result.runs)
    return rates[len(rates) // 2]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" of the seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference seed by seed, and its standard error (NaN for one seed)."""
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return statistics.fmean(gains), error


def comparison(ours: Sequence[float], theirs: Sequence[float], name: str) -> str:
    """Return "16.2 ± 0.8 points ahead of SGD", or that the two are not clearly apart."""
    gain, error = difference(ours, theirs)
    place = f"{'ahead of' if gain > 0 else 'behind'} {name}"
    if math.isnan(error):
        return f"{abs(gain):.1f} points {place} on the one seed"
    if abs(gain) <= SIGNIFICANT_ERRORS * error:
        return f"not clearly apart from {name} ({gain:+.1f} ± {error:.1f} points)"
    return f"{abs(gain):.1f} ± {error:.1f} points {place}"


def sentences(results: Sequence[Result]) -> list[str]:
    """Return the headline of one noise level: SAM over the other optimizers, trained to the end and stopped early."""
    by_name = {result.method.name: result for result in results}
    sam = by_name.get("sam")
    others = [by_name[name] for name in METHODS if name in by_name and name != "sam"]
    rates = len(results[0].runs)
    to_the_end = f"Trained to the last epoch{f', mean of {rates} learning rates' if rates > 1 else ''}"
    what = "learning rate and epoch" if rates > 1 else "epoch"
    with_help = f"With {what} chosen on the validation split"
    lines = []
    for start, measure in ((to_the_end, last), (with_help, stopped)):
        if sam is None or not others:
            reached = " and ".join(f"{r.method.phrase} reaches {mean_and_deviation(measure(r))} %" for r in results)
            lines.append(f"{start}, {reached}.")
            continue
        against = " and ".join(comparison(measure(sam), measure(r), r.method.phrase) for r in others)
        lines.append(f"{start}, SAM is {against}.")
    return lines
