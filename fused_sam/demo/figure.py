"""The figure shows accuracy on clean labels over the length of training, and over the learning rate or the noise.

Lines are means over seeds; bands extend one standard deviation to each side. Solid lines are last epochs, dotted ones
stop early where the validation split says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from .summary import difference, last, middle_lr, stopped
from .sweep import Result

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


def draw(path: Path, by_noise: Sequence[Sequence[Result]], data: str) -> None:
    """Write the figure in the format of the path's ending."""
    results = by_noise[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _curves(left, results)
        if len(by_noise) > 1:
            _over_noise(right, by_noise)
        else:
            _over_rates(right, results)
        left.set_ylabel("accuracy on clean test labels, %  (higher is better)")
        figure.suptitle(_title(results, data), x=0.01, ha="left", fontsize=13, color=INK)
        handles = [Line2D([], [], color=COLOURS[r.method.name], label=_label(r)) for r in results]
        handles += [
            Line2D([], [], color=INK, label="last epoch"),
            Line2D([], [], color=INK, linestyle=":", label="stopped early"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10)
        figure.savefig(path)


def _title(results: Sequence[Result], data: str) -> str:
    start = f"{data}, {results[0].noise:.0%} wrong labels"
    by_name = {result.method.name: result for result in results}
    if "sam" not in by_name or "sgd" not in by_name:
        return start
    gain, _ = difference(last(by_name["sam"]), last(by_name["sgd"]))
    helped, _ = difference(stopped(by_name["sam"]), stopped(by_name["sgd"]))
    rates = f", mean of {len(results[0].runs)} learning rates" if len(results[0].runs) > 1 else ""
    return (
        f"{start}: SAM {gain:+.1f} points over SGD at the last epoch{rates},\n"
        f"{helped:+.1f} with learning rate and epoch chosen on a validation split"
    )


def _label(result: Result) -> str:
    return result.method.label + ("" if result.rho is None else f", rho {result.rho:g}")


def _curves(axes: Axes, results: Sequence[Result]) -> None:
    rate = middle_lr(results[0])
    for result in sorted(results, key=lambda r: -r.method.stretch):  # the longer curve begins as the shorter one
        runs = result.runs[rate]
        x = np.array(runs[0].curve.passes)
        values = 100 * np.array([run.curve.test_accuracy for run in runs])
        mean, deviation = values.mean(0), values.std(0)
        colour = COLOURS[result.method.name]
        axes.plot(x, mean, color=colour, linewidth=2 if result.method.stretch == 1 else 4)
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x[-1], mean[-1], "o", color=colour, markersize=5)
    axes.set(title=f"Over the length of training, learning rate {rate:g}", xlabel="gradient passes over the data")
    axes.set_xlim(left=0)


def _over_rates(axes: Axes, results: Sequence[Result]) -> None:
    rates = sorted(results[0].runs)
    for result in results:
        colour = COLOURS[result.method.name]
        _line(axes, rates, [last(result, lr) for lr in rates], colour, "-")
        _line(axes, rates, [stopped(result, lr) for lr in rates], colour, ":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{rate:g}" for rate in rates])
    axes.set(title="Over the learning rate", xlabel="learning rate")


def _over_noise(axes: Axes, by_noise: Sequence[Sequence[Result]]) -> None:
    noises = [100 * results[0].noise for results in by_noise]
    for i, result in enumerate(by_noise[0]):
        colour = COLOURS[result.method.name]
        _line(axes, noises, [last(results[i]) for results in by_noise], colour, "-")
        _line(axes, noises, [stopped(results[i]) for results in by_noise], colour, ":")
    axes.xaxis.set_major_locator(FixedLocator(noises))
    axes.set(title="Over the noise (last epoch: mean of the rates)", xlabel="wrong labels, %")


def _line(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, style: str) -> None:
    mean = np.array([statistics.fmean(v) for v in values])
    axes.plot(x, mean, style, color=colour, marker="o", markersize=4)
    if style == "-":
        deviation = np.array([np.std(v) for v in values])
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
