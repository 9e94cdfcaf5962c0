"""One invocation of the benchmarks: where it runs, what it measured, and the folder that it writes to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import host_cost, memory, peers, plot, report, side_by_side, targets
from bench.hyper import Hyper
from bench.machine import describe, device_of
from bench.rounds import Progress as Watch
from bench.shapes import NETWORKS, by_name

console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)


class Run:
    """One invocation; `name` is the prefix of its files, so that several comparisons can share a folder."""

    def __init__(self, device: str, threads: int, out: Path | None, hyper: Hyper | None = None, name: str = "") -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = device_of(device)
        self.hyper = hyper or Hyper()
        self.name = name
        self.machine = describe(self.device)
        self.folder = out / self.machine.slug if out else None
        self.comparisons: list[side_by_side.Comparison] = []
        self.usages: list[memory.Usage] = []
        self.cost: host_cost.HostCost | None = None
        console.print(f"{self.machine.title}, commit {self.machine.commit or 'unknown'}")
        if self.machine.busy and self.device.type == "cpu":
            console.print(f"[yellow]The load average is {self.machine.load:.1f}: other work blurs these times.[/]")

    def choose(self, names: Sequence[str], compiled: bool = False) -> list[str]:
        chosen, notes = peers.choose(self.device, names, compiled)
        for note in notes:
            console.print(f"[yellow]{note}[/]")
        return chosen

    def compare(
        self,
        shapes: Sequence[str],
        names: list[str],
        rounds: int,
        seconds: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for shape in shapes:
            by_name(shape)  # all names are checked before the first shape is timed
        for shape in shapes:
            budget = seconds if shape in NETWORKS else seconds / 3
            with bar(f"side by side: {shape}") as progress:
                run = side_by_side.compare(
                    shape, names, self.device, self.hyper, rounds or None, budget, progress, dtype
                )
            self.comparisons.append(run)
            console.print(report.comparison_table(run))
            self.write("side_by_side", self.comparisons, announce=False)  # a stopped run keeps what it has

    def weigh(self, shapes: Sequence[str], names: list[str]) -> None:
        # Ours comes first, because other peers leave holes in the heap that would hide a temporary.
        ordered = sorted(names, key=lambda name: not peers.PEERS[name].ours)
        with bar("memory") as progress:
            for done, (shape, name) in enumerate((shape, name) for shape in shapes for name in ordered):
                self.usages.append(memory.measure(name, shape, self.device, self.hyper))
                progress((done + 1) / len(shapes) / len(ordered))
        console.print(report.memory_table(self.usages))

    def cost_on_host(self, peer: str, rounds: int) -> None:
        with bar("host cost") as progress:
            self.cost = host_cost.measure(peer, self.device, self.hyper, rounds, progress=progress)
        console.print(report.host_table(self.cost))

    def write(self, name: str, items: Sequence[Any], *, announce: bool = True) -> None:
        """Write one JSON file, if there are a folder and items."""
        if self.folder is not None and items:
            path = self.folder / f"{self.name}{name}.json"
            report.write(path, self.machine, self.hyper, name, items)
            if announce:
                console.print(f"Written to {path}", soft_wrap=True)

    def finish(self) -> None:
        """Print the targets and what was reached, then write the files."""
        if self.device.type == "cpu":
            report.print_targets(console, targets.outcomes(self.comparisons, self.usages, self.cost))
        if self.folder is None:
            return
        self.write("side_by_side", self.comparisons)
        self.write("memory", self.usages)
        self.write("host_cost", [self.cost] if self.cost else [])
        plot.all_of(self.comparisons, self.cost, self.folder, self.machine.title, self.name)


@contextmanager
def bar(what: str) -> Iterator[Watch]:
    """Show a progress bar until the work is done; yield a function that takes the fraction done."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)
