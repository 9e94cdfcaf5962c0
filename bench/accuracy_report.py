"""Table and plot of accuracies and their costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from bench.accuracy import FamilyTrial, Result
from bench.plot import OURS, STYLE, save
from bench.report import duration
from bench.tuning import Outcome


def table(result: Result) -> Table:
    seeds = len(result.outcomes[0].runs)
    made = Table(
        title=f"{result.setting.title}: accuracy on clean test labels, mean and standard deviation of {seeds} seeds",
        caption="time of the training steps, median of the seeds; * means that no method is both faster and better",
    )
    made.add_column("method")
    made.add_column("chosen")
    for column in ("accuracy, %", "passes", "time", "times SGD's", ""):
        made.add_column(column, justify="right")
    frontier = result.frontier()
    base = sgd_seconds(result)
    for outcome in result.outcomes:
        assert isinstance(outcome.winner, FamilyTrial)
        made.add_row(
            outcome.method.label,
            outcome.winner.text,
            f"{result.mean(outcome):.2f} ± {result.deviation(outcome):.2f}",
            f"{result.passes(outcome):.1f}",
            duration(result.seconds(outcome)),
            f"{result.seconds(outcome) / base:.2f}",
            "*" if outcome in frontier else "",
        )
    return made


def sgd_seconds(result: Result) -> float:
    """Return the unit of cost: the seconds of SGD's training, or of the first method's if SGD is missing."""
    named = {outcome.method.name: outcome for outcome in result.outcomes}
    return result.seconds(named.get("sgd", result.outcomes[0]))


def plot(results: Sequence[Result], path: Path, machine: str) -> Path:
    """Plot mean accuracy against time with one standard deviation and the frontier, one panel per setting."""
    with plt.rc_context(STYLE):
        columns = min(2, len(results))
        rows = -(-len(results) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(6.6 * columns, 4.8 * rows), squeeze=False)
        for axes in grid.flat[len(results) :]:
            axes.set_visible(False)
        for axes, result in zip(grid.flat, results, strict=False):
            panel(axes, result)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        return save(figure, path, machine)


def panel(axes: Axes, result: Result) -> None:
    frontier, base = result.frontier(), sgd_seconds(result)

    def place(outcome: Outcome) -> tuple[float, float]:
        return result.seconds(outcome) / base, result.mean(outcome)

    axes.step(*zip(*map(place, frontier), strict=True), where="post", color=OURS, lw=1, ls="--", zorder=1)
    # Names stand in a column, ordered by accuracy. Most methods cost two passes, so names at the points would overlap.
    ranked = sorted(result.outcomes, key=result.mean)
    for rank, outcome in enumerate(ranked):
        (x, y), on = place(outcome), outcome in frontier
        tint = OURS if on else "#64748b"
        axes.errorbar(x, y, yerr=result.deviation(outcome), fmt="o", ms=6 if on else 4, color=tint, lw=0.8, alpha=0.9)
        axes.annotate(
            f"{outcome.method.label}  {y:.1f}", (x, y), xytext=(1.04, (rank + 0.5) / len(ranked)),
            textcoords="axes fraction", fontsize=8, va="center", color=tint, fontweight="bold" if on else None,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": tint, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set(xlabel="training time, in units of SGD's", ylabel="test accuracy, %")
    axes.set_title(result.setting.title)
