"""Table and plot of SAM's step on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from rich.table import Table

from bench.distributed import PHASES, Spread
from bench.plot import OURS, STYLE, save
from bench.report import duration, times
from bench.stats import summary
from bench.targets import Outcome

MOST = 1.1  # times the expected time, because the processes share cores and wait for each other
COLUMNS = (
    "alone", "DDP", "DDP / alone", f"{PHASES} all-reduces", "FSDP2", "FSDP2 beyond alone", "quartiles",
    "FSDP2 / (alone + all-reduces)",
)  # fmt: skip


def table(found: Sequence[Spread], cores: int) -> Table:
    result = Table(
        title=f"Time of SAM's step, {found[0].local:,} elements per process, medians of {len(found[0].reduces)} rounds",
        caption=f"times of the slowest process; each has one thread, and all share {cores} cores and their memory",
    )
    result.add_column("processes", justify="right")
    for column in COLUMNS:
        result.add_column(column, justify="right")
    for spread in found:
        added = spread.added()
        result.add_row(
            str(spread.world),
            duration(spread.step("plain").median),
            duration(spread.step("DDP").median),
            times(spread.over_plain("DDP")),
            duration(summary(spread.reduces).median),
            duration(spread.step("FSDP2").median),
            signed(added.median),
            f"{signed(added.q1)} to {signed(added.q3)}",
            times(spread.over_prediction()),
        )
    return result


def outcomes(found: Sequence[Spread]) -> list[Outcome]:
    """Return the targets: a step costs what it costs alone, and sharded weights add one all-reduce per phase."""
    made = []
    for spread in found:
        where = f"{spread.world} process{'es' * (spread.world > 1)}"
        for what, ratio in (
            (f"{where}: DDP's step over the step alone", spread.over_plain("DDP")),
            (f"{where}: FSDP2's step over the step alone and {PHASES} all-reduces", spread.over_prediction()),
        ):
            made.append(Outcome(what, f"<= {MOST:g}", times(ratio), ratio.value <= MOST))
    return made


def signed(seconds: float) -> str:
    """Return the text of a duration that may be negative."""
    return duration(seconds) if seconds >= 0 else f"-{duration(-seconds)}"


def plot(found: Sequence[Spread], path: Path, machine: str) -> Path:
    """Plot a group of bars per number of processes: alone, DDP, alone with the all-reduces on top, FSDP2."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 4.4))
        for group, spread in enumerate(found):
            alone, reduces = spread.step("plain").median * 1e3, summary(spread.reduces).median * 1e3
            bars = (
                (alone, 0.0, "#94a3b8", "alone, in the same processes"),
                (spread.step("DDP").median * 1e3, 0.0, "#0891b2", "DDP"),
                (alone, reduces, "#94a3b8", None),
                (spread.step("FSDP2").median * 1e3, 0.0, OURS, "FSDP2"),
            )
            for place, (height, above, tint, label) in enumerate(bars):
                x = group + (place - 1.5) * 0.2
                axes.bar(x, height, width=0.18, color=tint, label=label if group == 0 else None)
                if above:
                    axes.bar(x, above, bottom=height, width=0.18, color="#1e293b",
                             label="two bare all-reduces on top" if group == 0 else None)  # fmt: skip
        axes.set_xticks(range(len(found)), [f"{spread.world} process{'es' * (spread.world > 1)}" for spread in found])
        axes.set_ylabel("step, ms, slowest process")
        axes.set_title(f"SAM's step on {found[0].local / 1e6:.1f}M elements per process, one thread each")
        axes.legend(frameon=False)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        return save(figure, path, machine)
