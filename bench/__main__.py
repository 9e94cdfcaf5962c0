"""Command line of the benchmarks: `python -m bench` runs them all, a sub-command runs one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import host_cost, memory, peers, plot, report, side_by_side, targets
from bench.errors import BenchError
from bench.hyper import Hyper
from bench.machine import describe, device_of
from bench.shapes import NETWORKS, by_name

HERE = Path(__file__).parent
SHAPES = [*NETWORKS, "1000x256"]
SCALING = ["10x256", "100x256", "3000x256", "10000x256"]
MEMORY_SHAPES = ["transformer24m", "resnet50"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)

Shapes = Annotated[list[str], typer.Option("--shape", help=f"{', '.join(NETWORKS)} or COUNTxSIZE; may be repeated.")]
Peers = Annotated[list[str], typer.Option("--peer", help=f"{', '.join(peers.PEERS)}; may be repeated.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's own choice.")]
Out = Annotated[Path | None, typer.Option(help="Write JSON and plots into a folder in it, named after the machine.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for a network's rounds; COUNTxSIZE takes a third.")]
Rounds = Annotated[int, typer.Option(min=0, help="Rounds for each shape in place of a time; 0 goes by --seconds.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Add the multi-tensor code under torch.compile: minutes.")]
WeightDecay = Annotated[float, typer.Option(min=0.0, help="SGD's weight decay.")]

DECAY = Hyper.weight_decay
BUDGET = 25.0
HOST_ROUNDS = 40


class Run:
    """One invocation: where it runs, what it measured, and the folder that it writes to."""

    def __init__(self, device: str, threads: int, out: Path | None, weight_decay: float = DECAY) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = device_of(device)
        self.hyper = Hyper(weight_decay=weight_decay)
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

    def compare(self, shapes: Sequence[str], names: list[str], rounds: int, seconds: float) -> None:
        for shape in shapes:
            by_name(shape)  # every name is good before the first is timed
        for shape in shapes:
            budget = seconds if shape in NETWORKS else seconds / 3
            with bar(f"side by side: {shape}") as progress:
                run = side_by_side.compare(
                    shape, names, self.device, self.hyper, rounds or None, budget, progress=progress
                )
            self.comparisons.append(run)
            console.print(report.comparison_table(run))

    def weigh(self, shapes: Sequence[str], names: list[str]) -> None:
        # Ours first, on a heap where no other peer has left holes for a temporary to hide in.
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

    def finish(self) -> None:
        """Targets against what was reached, then the files."""
        if self.device.type == "cpu":
            found = targets.outcomes(self.comparisons, self.usages, self.cost)
            if found:
                console.print(report.target_table(found))
        if self.folder is None:
            return
        subjects: dict[str, list[Any]] = {
            "side_by_side": self.comparisons,
            "memory": self.usages,
            "host_cost": [self.cost] if self.cost else [],
        }
        for name, items in subjects.items():
            if items:
                report.write(self.folder / f"{name}.json", self.machine, self.hyper, name, items)
        plot.all_of(self.comparisons, self.cost, self.folder, self.machine.title)
        console.print(f"Written to {self.folder}")


@contextmanager
def bar(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar that goes when the work is done; yields a function that takes the fraction done."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


@app.command("all")
def everything(
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = HERE / "results",
    seconds: Seconds = BUDGET,
    compiled: Compiled = False,
) -> None:
    """All of it, in a few minutes, written under bench/results; it runs where no sub-command is named."""
    run = Run(device, threads, out)
    names = run.choose([], compiled)
    run.weigh(MEMORY_SHAPES, names)
    run.cost_on_host(peers.baseline(names), HOST_ROUNDS)
    run.compare([*SHAPES, *SCALING], names, 0, seconds)
    run.finish()


@app.command("side-by-side")
def side_by_side_command(
    shape: Shapes = SHAPES,
    peer: Peers = [],  # noqa: B006 (typer reads the default, nothing writes to it)
    rounds: Rounds = 0,
    seconds: Seconds = BUDGET,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
    compiled: Compiled = False,
    weight_decay: WeightDecay = DECAY,
) -> None:
    """Times of a step in interleaved rounds, and ratios to this package's."""
    run = Run(device, threads, out, weight_decay)
    run.compare(shape, run.choose(peer, compiled), rounds, seconds)
    run.finish()


@app.command("memory")
def memory_command(
    shape: Shapes = MEMORY_SHAPES,
    peer: Peers = [],  # noqa: B006
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """What a step keeps and allocates beyond weights, gradients and momentum."""
    run = Run(device, threads, out)
    run.weigh(shape, run.choose(peer))
    run.finish()


@app.command("host-cost")
def host_cost_command(
    peer: Annotated[str, typer.Option(help="One peer; by default this package.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = HOST_ROUNDS,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """What a step costs whatever the tensors' size, from 10 to 10,000 tensors."""
    run = Run(device, threads, out)
    run.cost_on_host(peers.baseline(run.choose([peer] if peer else [])), rounds)
    run.finish()


@app.command("micro", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def micro(context: typer.Context, device: Device = "cpu") -> None:
    """Both halves of a step one by one, under pytest-benchmark; further arguments are pytest's."""
    import pytest

    os.environ["BENCH_DEVICE"] = device_of(device).type
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={HERE}", str(HERE / "micro"), *context.args]
    raise typer.Exit(pytest.main(arguments))


def main(arguments: list[str]) -> int:
    """Run a command line, `all` where it names no command. What cannot be done is one line and code 2."""
    commands = {command.name for command in app.registered_commands}
    if not commands & set(arguments) and "--help" not in arguments:
        arguments = ["all", *arguments]
    try:
        app(arguments, prog_name="python -m bench")
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
