"""The figure shows accuracy and losses over gradient passes, and each seed's final accuracies side by side.

Lines are means over seeds; bands extend one standard deviation to each side. The horizontal axis is cost: an epoch of
SAM is two gradient passes over the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .tuning import Outcome

# Okabe and Ito's colours, which colour-blind readers can distinguish too.
COLOURS = {"sgd": "#0072B2", "sgd-2x": "#E69F00", "sam": "#009E73"}
INK = "#333333"
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def draw(path: Path, outcomes: Sequence[Outcome], data: str, noise: float) -> None:
    """Write the figure in the format of the path's ending."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        (accuracy, finals), (train, test) = figure.subplots(2, 2)
        _curves(accuracy, outcomes, "test_accuracy", "Test accuracy on clean labels, %", factor=100)
        _finals(finals, outcomes, "At the end, %: one line per seed, dots are means")
        _curves(train, outcomes, "train_loss", "Training loss on noisy labels")
        _curves(test, outcomes, "test_loss", "Test loss on clean labels")
        figure.suptitle(
            f"SGD and SAM on {data} with {noise:.0%} of the training labels replaced at random",
            x=0.01,
            ha="left",
            fontsize=13,
            color=INK,
        )
        figure.legend(
            *accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=len(outcomes) + 1, fontsize=10
        )
        figure.savefig(path)


def _curves(axes: Axes, outcomes: Sequence[Outcome], field: str, title: str, factor: float = 1) -> None:
    late_values = []  # without the steep first fifth, which would flatten the rest of the plot
    for outcome in outcomes:
        x = np.array(outcome.runs[0].curve.passes)
        values = factor * np.array([getattr(run.curve, field) for run in outcome.runs])
        mean, deviation = values.mean(0), values.std(0)
        colour = COLOURS[outcome.method.name]
        axes.plot(x, mean, color=colour, label=f"{outcome.method.label} ({_chosen(outcome)})")
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x[-1], mean[-1], "o", color=colour, markersize=5)
        late = x >= 0.2 * x[-1]
        late_values += [mean[late] - deviation[late], mean[late] + deviation[late]]
    shown = np.concatenate(late_values)
    shown = shown[np.isfinite(shown)]  # a run may have diverged
    if shown.size and shown.max() > shown.min():
        margin = 0.04 * (shown.max() - shown.min())
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set(title=title, xlabel="gradient passes over the training data")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finals(axes: Axes, outcomes: Sequence[Outcome], title: str) -> None:
    values = 100 * np.array([[run.test_accuracy for run in outcome.runs] for outcome in outcomes])
    x = np.arange(len(outcomes))
    axes.plot(x, values, color="#bbbbbb", linewidth=1, marker="o", markersize=3)
    for i, outcome in enumerate(outcomes):
        mean = values[i].mean()
        axes.plot(i, mean, "o", color=COLOURS[outcome.method.name], markersize=9, zorder=3)
        axes.annotate(
            f"{mean:.1f}", (i, mean), (9, 0), textcoords="offset points", va="center", color=INK, fontweight="bold"
        )
    axes.set_xticks(x, [outcome.method.label for outcome in outcomes])
    axes.set_xlim(-0.4, len(outcomes) - 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_title(title)


def _chosen(outcome: Outcome) -> str:
    rho = "" if outcome.winner.rho is None else f", rho {outcome.winner.rho:g}"
    return f"lr {outcome.winner.lr:g}{rho}"
