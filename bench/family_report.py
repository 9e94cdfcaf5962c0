"""Tables, targets and plots of the family's speed: training steps over SGD's, and the optimizers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

from bench.family import METHODS
from bench.methods import BASELINE, NETWORKS, Training
from bench.optimizer_work import WITHIN, Work
from bench.plot import OURS, STYLE, name_rows, save
from bench.report import duration, spread, times
from bench.stats import summary
from bench.targets import Outcome


def training_table(run: Training) -> Table:
    table = Table(
        title=f"{NETWORKS[run.network].title}: {run.parameters:,} parameters, batches of {run.batch}, medians of "
        f"{len(run.steps[BASELINE])} rounds of ten steps",
        caption="ratios to a step of torch.optim.SGD(fused=True), with 95% intervals",
    )
    table.add_column("method")
    for column in ("step", "quartiles", "times SGD's (95%)", "target"):
        table.add_column(column, justify="right")
    for name in run.steps:
        step, target = run.step(name), METHODS[name].target
        table.add_row(
            METHODS[name].label,
            duration(step.median),
            spread(step),
            times(run.ratio(name)),
            "" if target is None else f"{target:g}",
        )
    return table


def work_table(work: Work) -> Table:
    table = Table(
        title=f"The optimizers alone, {work.shape}: {work.numel:,} parameters, medians of {len(work.copy)} rounds",
        caption=f"copy_ of all weights at once takes {duration(summary(work.copy).median)}, 8 bytes per parameter",
    )
    table.add_column("method")
    for column in ("bytes per parameter", "step", "quartiles", "GB/s", "of copy_'s rate (95%)"):
        table.add_column(column, justify="right")
    for name in work.steps:
        table.add_row(
            METHODS[name].label,
            f"{work.floor(name):.4g}",
            duration(work.step(name).median),
            spread(work.step(name)),
            f"{work.rate(name) / 1e9:.1f}",
            times(work.copy_fraction(name)),
        )
    return table


def outcomes(trainings: Iterable[Training], work: Work | None) -> list[Outcome]:
    found = []
    for run in trainings:
        for name in run.steps:
            target = METHODS[name].target
            if target is not None:
                ratio = run.ratio(name)
                what = f"{run.network}: a step of {METHODS[name].label}, in steps of SGD"
                found.append(Outcome(what, f"<= {target:g}", times(ratio), ratio.value <= target))
    for name in work.steps if work else ():
        assert work is not None
        if name != BASELINE:
            share = work.copy_fraction(name)
            what = f"{METHODS[name].label} alone: bytes moved, of copy_'s rate"
            found.append(Outcome(what, f">= {WITHIN:g}", times(share), share.value >= WITHIN))
    return found


def plot_training(runs: Sequence[Training], path: Path, machine: str) -> Path:
    """Plot each method's step in steps of SGD, with its target as a mark, one panel per network."""
    with plt.rc_context(STYLE):
        rows = max(len(run.steps) for run in runs)
        figure, grid = plt.subplots(1, len(runs), figsize=(6.2 * len(runs), 0.36 * rows + 1.4), squeeze=False)
        for axes, run in zip(grid.flat, runs, strict=True):
            training_panel(axes, run)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        return save(figure, path, machine)


def training_panel(axes: Axes, run: Training) -> None:
    names = sorted(run.steps, key=lambda name: run.ratio(name).value)
    for row, name in enumerate(names):
        ratio, target = run.ratio(name), METHODS[name].target
        axes.barh(row, ratio.value, height=0.66, color="#94a3b8" if name == BASELINE else OURS)
        axes.plot([ratio.low, ratio.high], [row, row], color="black", lw=1)
        if target is not None:
            axes.plot([target, target], [row - 0.42, row + 0.42], color="#1e293b", lw=2)
        axes.annotate(
            f"{ratio.value:.2f}", (max(ratio.high, ratio.value, target or 0), row), xytext=(6, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    name_rows(axes, [METHODS[name].label for name in names])
    axes.axvline(1, color="#1e293b", lw=0.8, ls=":")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_xlabel("time of a training step over SGD's; dark mark: target")
    axes.set_title(NETWORKS[run.network].title)


def plot_work(work: Work, path: Path, machine: str) -> Path:
    """Plot each optimizer's rate over copy_'s."""
    with plt.rc_context(STYLE):
        names = list(work.steps)
        figure, axes = plt.subplots(figsize=(7.6, 0.36 * len(names) + 1.4))
        for row, name in enumerate(names):
            share = work.copy_fraction(name)
            axes.barh(row, share.value, height=0.66, color="#94a3b8" if name == BASELINE else OURS)
            axes.plot([share.low, share.high], [row, row], color="black", lw=1)
            axes.annotate(
                f"{share.value:.2f}  ({work.floor(name):.3g} bytes)", (max(share.value, share.high), row),
                xytext=(6, 0), textcoords="offset points", va="center",
            )  # fmt: skip
        name_rows(axes, [METHODS[name].label for name in names])
        axes.axvline(WITHIN, color="#1e293b", lw=0.8, ls=":")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.3)
        axes.set_xlabel("bytes that the method has to move over its time, in units of copy_'s rate")
        axes.set_title(f"Optimizer work alone, {work.numel / 1e6:.1f}M parameters")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        return save(figure, path, machine)
