"""PNG plots: each peer's time over ours, its growth with the number of tensors, and bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.host_cost import HostCost
from bench.peers import PEERS
from bench.report import duration
from bench.shapes import equal_tensors
from bench.side_by_side import Comparison
from bench.stats import summary
from bench.targets import HOST_SECONDS, HOST_TENSORS

OURS = "#c2410c"
# The colours differ in print and for colour-blind readers, and ours differs from all others.
COLOURS = {
    "per-tensor": "#64748b",
    "pytorch-optimizer": "#94a3b8",
    "foreach": "#1d4ed8",
    "foreach-fused": "#0891b2",
    "in-place": "#65a30d",
    "compiled": "#7c3aed",
}
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


def colour(peer: str) -> str:
    return COLOURS.get(peer, OURS)


def save(figure: Figure, path: Path, machine: str) -> Path:
    """Write the figure with the machine named below it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.text(0.995, 0.005, machine, ha="right", va="bottom", fontsize=7.5, color="#64748b")
    figure.savefig(path)
    plt.close(figure)
    return path


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of bars 0, 1, ..., with the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def ratios(runs: Sequence[Comparison], path: Path, machine: str) -> Path:
    """Plot each peer's step in units of ours, split into the step's two halves, one panel per shape."""
    with plt.rc_context(STYLE):
        columns = min(2, len(runs))
        rows = -(-len(runs) // columns)
        peers = max(len(run.steps) for run in runs)
        figure, grid = plt.subplots(
            rows, columns, figsize=(5.6 * columns, (0.38 * peers + 0.75) * rows + 0.75), squeeze=False
        )
        for axes in grid.flat[len(runs) :]:
            axes.set_visible(False)
        for axes, run in zip(grid.flat, runs, strict=False):
            ratio_panel(axes, run)
        height = figure.get_figheight()
        heading = f"Time of a SAM + {runs[0].base.__name__} step, in units of fused_sam's"
        figure.text(0.012, 1 - 0.16 / height, heading, va="center",
                    fontsize=12.5, fontweight="bold")  # fmt: skip
        figure.text(0.012, 1 - 0.40 / height, "solid: first step, pale: second step, black: 95% interval",
                    va="center", color="#475569")  # fmt: skip
        figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - 0.55 / height), h_pad=1.4)
        return save(figure, path, machine)


def ratio_panel(axes: Axes, run: Comparison) -> None:
    peers = sorted(run.steps, key=lambda peer: run.ratio(peer).value)
    for row, peer in enumerate(peers):
        ratio = run.ratio(peer)
        first, second = run.phases(peer)
        split = ratio.value * first.median / (first.median + second.median)
        axes.barh(row, split, height=0.68, color=colour(peer))
        axes.barh(row, ratio.value - split, left=split, height=0.68, color=colour(peer), alpha=0.62)
        note = f"{ratio.value:.2f}x" if ratio.value < 10 else f"{ratio.value:.0f}x"
        if peer != run.baseline:
            axes.plot([ratio.low, ratio.high], [row, row], color="black", lw=1)
        text = duration(summary(run.total(peer)).median)
        label = text if peer == run.baseline else f"{note}    {text}"
        axes.annotate(
            label, (max(ratio.high, ratio.value), row), xytext=(6, 0), textcoords="offset points",
            va="center", fontweight="bold" if PEERS[peer].ours else None,
        )  # fmt: skip
    name_rows(axes, [run.label(peer) for peer in peers])
    for tick, peer in zip(axes.get_yticklabels(), peers, strict=True):
        tick.set_fontweight("bold" if PEERS[peer].ours else "normal")
    axes.axvline(1, color="#1e293b", lw=0.8, ls=":")
    longest = max(run.ratio(peer).high for peer in peers)
    axes.set_xlim(0, longest * 1.5)
    axes.set_title(run.title)


def plain_log(axes: Axes) -> None:
    """Make the axes logarithmic, with ticks in ordinary notation."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#e2e8f0", lw=0.8)


def scaling(runs: Sequence[Comparison], path: Path, machine: str) -> Path:
    """Plot the time of a step against the number of tensors of equal size, one line per peer."""
    runs = sorted(runs, key=lambda run: run.tensors)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 4.6))
        counts = [run.tensors for run in runs]
        slowest_first = sorted(runs[-1].steps, key=lambda peer: -runs[-1].total(peer).mean())
        peers = [peer for peer in slowest_first if all(peer in run.steps for run in runs)]
        for peer in peers:
            medians = [float(np.median(run.total(peer))) * 1e3 for run in runs]
            ours = PEERS[peer].ours
            axes.plot(
                counts, medians, marker="o", ms=5 if ours else 3.5, lw=2.4 if ours else 1.5,
                color=colour(peer), zorder=3 if ours else 2, label=runs[-1].label(peer),
            )  # fmt: skip
        plain_log(axes)
        axes.set(xlabel="tensors of 256 elements", ylabel="step, ms")
        axes.set_title("Step time by number of tensors")
        axes.legend(frameon=False)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        return save(figure, path, machine)


def bandwidth(runs: Sequence[Comparison], path: Path, machine: str) -> Path:
    """Plot the bytes per second of ours and of `copy_`, one pair of bars per shape."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 0.85 * len(runs) + 1.3))
        for row, run in enumerate(runs):
            ours, copy = run.rate() / 1e9, run.copy_rate() / 1e9
            share = f"{ours:.1f} GB/s, {run.copy_fraction().value:.2f} of copy_"
            for offset, rate, tint, note, weight in (
                (-0.2, ours, OURS, f"{run.label(run.baseline)}: {share}", "bold"),
                (0.2, copy, "#94a3b8", f"torch copy_: {copy:.1f} GB/s", "normal"),
            ):
                axes.barh(row + offset, rate, height=0.36, color=tint)
                axes.annotate(
                    note, (0, row + offset), xytext=(6, 0), textcoords="offset points", va="center",
                    fontweight=weight, color="white" if tint == OURS else "black",
                )  # fmt: skip
        name_rows(axes, [run.title.replace(": ", "\n") for run in runs])
        axes.set_xlabel("GB/s: bytes that the work must move, over its time")
        axes.set_title(f"Memory bandwidth of a SAM + {runs[0].base.__name__} step")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        return save(figure, path, machine)


def host_cost(cost: HostCost, path: Path, machine: str) -> Path:
    """Plot the step time of one-element tensors against their number, with the fitted line."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.3))
        counts = np.array(cost.counts, dtype=float)
        medians = np.array([step.median for step in cost.steps]) * 1e6
        low, high = (np.array([getattr(step, end) for step in cost.steps]) * 1e6 for end in ("q1", "q3"))
        axes.errorbar(
            counts,
            medians,
            yerr=[medians - low, high - medians],
            fmt="o",
            color=OURS,
            capsize=3,
            label="median, quartiles",
        )
        line = cost.line
        dense = np.geomspace(counts.min(), counts.max(), 200)
        text = f"{line.intercept * 1e6:.1f} us + {line.slope * 1e6:.2f} us per tensor"
        axes.plot(dense, (line.intercept + line.slope * dense) * 1e6, color="#64748b", lw=1.2, label=text, zorder=1)
        axes.plot(
            [HOST_TENSORS], [HOST_SECONDS * 1e6], marker="v", color="#1e293b", ls="none",
            label=f"target at {HOST_TENSORS} tensors: below {HOST_SECONDS * 1e6:.0f} us",
        )  # fmt: skip
        plain_log(axes)
        axes.set(xlabel="tensors of one element", ylabel="step, us")
        axes.set_title(f"Host cost of a step, {PEERS[cost.peer].label()}")
        axes.legend(frameon=False)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        return save(figure, path, machine)


def all_of(
    runs: Sequence[Comparison], cost: HostCost | None, folder: Path, machine: str, prefix: str = ""
) -> list[Path]:
    """Write every plot that the measurements allow, and return the paths. File names begin with `prefix`."""
    rows = [run for run in runs if equal_tensors(run.shape) in (None, (1000, 256))] or list(runs)
    large = [run for run in runs if equal_tensors(run.shape) is None]
    equal = [run for run in runs if (equal_tensors(run.shape) or (0, 0))[1] == 256]
    made = []
    if rows:
        made.append(ratios(rows, folder / f"{prefix}ratios.png", machine))
    if large and PEERS[large[0].baseline].ours:
        made.append(bandwidth(large, folder / f"{prefix}bandwidth.png", machine))
    if len(equal) > 1:
        made.append(scaling(equal, folder / f"{prefix}scaling.png", machine))
    if cost:
        made.append(host_cost(cost, folder / "host_cost.png", machine))
    return made
