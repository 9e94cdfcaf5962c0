"""Tables for the terminal and JSON files of the measurements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.host_cost import HostCost
from bench.hyper import Hyper
from bench.machine import Machine
from bench.memory import Usage
from bench.peers import PEERS
from bench.side_by_side import Comparison
from bench.stats import Ratio, Summary, summary
from bench.targets import Outcome


def write(path: Path, machine: Machine, hyper: Hyper, name: str, items: Sequence[Any]) -> None:
    """Write one JSON file: the machine, the hyper-parameters, and each item's `as_json` under `name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": asdict(machine), "hyper": asdict(hyper), name: [item.as_json() for item in items]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def duration(seconds: float) -> str:
    """Return the text of a duration: three significant digits in a suitable unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(bytes_: int) -> str:
    """Return the text of a size: bytes up to 10,000, megabytes above."""
    return f"{bytes_ / 1e6:.1f} MB" if bytes_ > 10_000 else f"{bytes_} B"


def spread(times: Summary) -> str:
    return f"{duration(times.q1)} to {duration(times.q3)}"


def times(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def comparison_table(run: Comparison) -> Table:
    rounds, ours = len(run.copy), PEERS[run.baseline].ours
    table = Table(
        title=f"{run.shape}: {run.numel:,} parameters in {run.tensors:,} tensors, medians of {rounds} rounds",
        caption=bandwidth(run) if ours else None,
    )
    table.add_column("peer")
    for column in (
        "step",
        "quartiles",
        "first step",
        "second step",
        f"times {'ours' if ours else run.baseline} (95%)",
    ):
        table.add_column(column, justify="right")
    for peer in run.steps:
        step = summary(run.total(peer))
        first, second = run.phases(peer)
        table.add_row(
            run.label(peer),
            duration(step.median),
            spread(step),
            duration(first.median),
            duration(second.median),
            times(run.ratio(peer)),
            style="bold" if PEERS[peer].ours else None,
        )
    return table


def bandwidth(run: Comparison) -> str:
    rate, copy = run.rate() / 1e9, run.copy_rate() / 1e9
    return f"{run.label(run.baseline)} moves {rate:.1f} GB/s, {times(run.copy_fraction())} of copy_'s {copy:.1f} GB/s"


def memory_table(usages: Iterable[Usage]) -> Table:
    table = Table(title="Memory of a step beyond weights, gradients and momentum")
    table.add_column("peer")
    for column in ("shape", "kept", "copies", "temporary", "largest single", "allocations", "process grew"):
        table.add_column(column, justify="right")
    for usage in usages:
        table.add_row(
            PEERS[usage.peer].label(),
            usage.shape,
            size(usage.kept),
            f"{usage.kept / usage.weights:.2f}",
            size(usage.temporary),
            size(usage.largest),
            str(usage.allocations),
            "unknown" if usage.resident is None else size(usage.resident),
            style="bold" if PEERS[usage.peer].ours else None,
        )
    return table


def host_table(cost: HostCost) -> Table:
    line = cost.line
    caption = f"{line.intercept * 1e6:.1f} us + {line.slope * 1e6:.3f} us per tensor, within {line.worst:.0%}"
    for shape, seconds in cost.beside_kernels.items():
        caption += f"; {shape}: {duration(seconds.median)} outside the kernels"
    table = Table(title=f"{PEERS[cost.peer].label()}: cost of a step with tensors of one element", caption=caption)
    for column in ("tensors", "step", "quartiles", "per tensor"):
        table.add_column(column, justify="right")
    for count, step in zip(cost.counts, cost.steps, strict=True):
        table.add_row(f"{count:,}", duration(step.median), spread(step), duration(step.median / count))
    return table


def print_targets(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print a table of the targets and what a run reached, if it has targets."""
    if not outcomes:
        return
    table = Table(title="Target and reached")
    for column in ("what", "target", "reached", ""):
        table.add_column(column)
    for outcome in outcomes:
        verdict = "[green]met[/]" if outcome.met else "[red]missed[/]"
        table.add_row(outcome.what, outcome.target, outcome.reached, verdict)
    console.print(table)
