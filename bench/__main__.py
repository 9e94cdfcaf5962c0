"""Run the benchmarks: `python -m bench` runs those of SAM with SGD, and each sub-command runs one benchmark."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import peers
from bench.errors import BenchError
from bench.hyper import AdamHyper, Hyper
from bench.machine import device_of
from bench.run import Run, bar, console
from bench.shapes import NETWORKS, by_name
from fused_sam.demo.options import FASHION_FOLDER

HERE = Path(__file__).parent
SHAPES = [*NETWORKS, "1000x256"]
SCALING = ["10x256", "100x256", "3000x256", "10000x256"]
MEMORY_SHAPES = ["transformer24m", "resnet50"]

ADAMW_SHAPES = ["transformer24m", "resnet50"]
ADAMW_PEERS = ["per-tensor", "foreach-fused", "in-place", "ours-cpu"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

SHAPE = f"one of {', '.join(NETWORKS)}, or COUNTxSIZE"

Shapes = Annotated[list[str], typer.Option("--shape", help=f"Measure {SHAPE}; may be repeated.")]
Peers = Annotated[list[str], typer.Option("--peer", help=f"Run one of {', '.join(peers.PEERS)}; may be repeated.")]
Methods = Annotated[list[str], typer.Option("--method", help="Run this method; may be repeated. The default is all.")]
Networks = Annotated[list[str], typer.Option("--network", help="Train one of cnn, mlp; may be repeated.")]
Processes = Annotated[list[int], typer.Option(min=1, help="Run this many processes; may be repeated.")]
Device = Annotated[str, typer.Option(help="Run on cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=0, help="Use this many CPU threads; 0 leaves torch's own choice.")]
Out = Annotated[Path | None, typer.Option(help="Write JSON and plots into its subfolder named after the machine.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Give a network's rounds this time; COUNTxSIZE takes a third.")]
Rounds = Annotated[int, typer.Option(min=0, help="Run this many rounds per shape; 0 goes by --seconds.")]
RoundCount = Annotated[int, typer.Option("--rounds", min=1, help="Run this many rounds.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Add the multi-tensor code under torch.compile (minutes).")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Use bf16 weights and gradients; this package keeps fp32 momentum.")]
Quick = Annotated[bool, typer.Option("--quick", help="Show that it runs, small and short; its times mean nothing.")]
WeightDecay = Annotated[float, typer.Option(min=0.0, help="Set SGD's weight decay.")]

DECAY = Hyper.weight_decay
BUDGET = 25.0
HOST_ROUNDS = 40


@app.command("all")
def everything(
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = HERE / "results",
    seconds: Seconds = BUDGET,
    compiled: Compiled = False,
) -> None:
    """Measure memory, host cost and times of SAM with SGD, into bench/results. Runs if no sub-command is named."""
    run = Run(device, threads, out)
    names = run.choose([], compiled)
    run.weigh(MEMORY_SHAPES, names)
    run.cost_on_host(peers.baseline(names), HOST_ROUNDS)
    run.compare([*SHAPES, *SCALING], names, 0, seconds)
    run.finish()


@app.command("side-by-side")
def side_by_side_command(
    shape: Shapes = SHAPES,
    peer: Peers = [],  # noqa: B006 (typer reads the default, and nothing writes to it)
    rounds: Rounds = 0,
    seconds: Seconds = BUDGET,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
    compiled: Compiled = False,
    weight_decay: WeightDecay = DECAY,
    bf16: Bf16 = False,
) -> None:
    """Time steps in interleaved rounds, and give their ratios to this package's."""
    run = Run(device, threads, out, Hyper(weight_decay=weight_decay), "bf16_" if bf16 else "")
    chosen = run.choose(peer, compiled)
    if bf16 and not peer and run.device.type == "cpu":
        chosen = [name for name in chosen if name not in peers.WRONG_IN_BF16]
    run.compare(shape, chosen, rounds, seconds, torch.bfloat16 if bf16 else torch.float32)
    run.finish()


@app.command("adamw")
def adamw(
    shape: Shapes = ADAMW_SHAPES,
    peer: Peers = [],  # noqa: B006
    rounds: Rounds = 0,
    seconds: Seconds = BUDGET,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """Run side-by-side with AdamW as the base optimizer."""
    run = Run(device, threads, out, AdamHyper(), "adamw_")
    usual = ADAMW_PEERS if run.device.type == "cpu" else []
    run.compare(shape, run.choose(peer or usual), rounds, seconds)
    run.finish()


@app.command("memory")
def memory_command(
    shape: Shapes = MEMORY_SHAPES,
    peer: Peers = [],  # noqa: B006
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
    processes: Annotated[int, typer.Option(min=1, help="Leave out modes that need more processes.")] = 4,
) -> None:
    """Measure a step's memory beyond weights, gradients and momentum, and what SAM keeps in each way to train."""
    run = Run(device, threads, out)
    run.weigh(shape, run.choose(peer))
    if run.device.type == "cpu":
        from bench import extra_memory, extra_report, report

        with bar("memory beyond the base optimizer") as progress:
            found = extra_memory.measure_all(shape[0], processes, progress)
        console.print(extra_report.table(found))
        report.print_targets(console, extra_report.outcomes(found))
        run.write("extra_memory", found)
        if run.folder is not None:
            extra_report.plot(found, run.folder / "extra_memory.png", run.machine.title)
    run.finish()


@app.command("distributed")
def distributed_command(
    shape: Annotated[str, typer.Option(help=f"Give each process {SHAPE}.")] = "resnet18",
    processes: Processes = [1, 2, 4],  # noqa: B006
    rounds: RoundCount = 30,
    repeats: Annotated[int, typer.Option(min=1, help="Take this many steps per turn; their median counts.")] = 5,
    out: Out = None,
    quick: Quick = False,
) -> None:
    """Time SAM's step on several gloo processes with DDP's and FSDP2's weights, and bare all-reduces."""
    from bench import distributed, distributed_report, report

    by_name(shape)
    if quick:
        shape, rounds, repeats = "3x20000", 2, 1
    run = Run("cpu", 0, out)  # the processes have one thread each, and this one waits
    with bar("processes") as progress:
        found = distributed.measure_all(shape, run.hyper, rounds, repeats, tuple(processes), progress)
    console.print(distributed_report.table(found, run.machine.cores))
    report.print_targets(console, [] if quick else distributed_report.outcomes(found))
    run.write("distributed", found)
    if run.folder is not None:
        distributed_report.plot(found, run.folder / "distributed.png", run.machine.title)


@app.command("methods")
def methods_command(
    method: Methods = [],  # noqa: B006
    network: Networks = ["cnn", "mlp"],  # noqa: B006
    shape: Annotated[str, typer.Option(help="Run the optimizers alone on this shape.")] = "transformer24m",
    rounds: RoundCount = 15,
    threads: Threads = 0,
    out: Out = None,
    quick: Quick = False,
) -> None:
    """Time a training step of every method over SGD's, and its optimizer's rate of moving bytes over copy_'s."""
    from bench import family, family_report, methods, optimizer_work, report

    names = family.chosen(method)
    for name in network:
        if name not in methods.NETWORKS:
            raise BenchError(f"unknown network {name!r}: choose from {', '.join(methods.NETWORKS)}")
    by_name(shape)
    if quick:
        shape, rounds = "5x3000", 2
    run = Run("cpu", threads, out)
    trainings = []
    for name in network:
        with bar(methods.NETWORKS[name].title) as progress:
            trainings.append(methods.measure(name, names, rounds, 4 if quick else 0, progress))
        console.print(family_report.training_table(trainings[-1]))
    with bar("optimizers alone") as progress:
        work = optimizer_work.measure(shape, names, rounds, progress)
    console.print(family_report.work_table(work))
    report.print_targets(console, [] if quick else family_report.outcomes(trainings, work))
    run.write("methods", trainings)
    run.write("optimizer_work", [work])
    if run.folder is not None:
        family_report.plot_training(trainings, run.folder / "methods.png", run.machine.title)
        family_report.plot_work(work, run.folder / "optimizer_work.png", run.machine.title)


@app.command("accuracy")
def accuracy_command(
    method: Methods = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Train every chosen trial on this many seeds.")] = 5,
    data_dir: Annotated[
        Path, typer.Option(help="Read Fashion-MNIST's four IDX .gz files from this folder.")
    ] = FASHION_FOLDER,
    threads: Threads = 0,
    out: Out = HERE / "results",
    quick: Quick = False,
) -> None:
    """Measure accuracy and cost on digits and Fashion-MNIST, with right and wrong labels. A stopped run resumes."""
    from bench import accuracy, accuracy_report, family

    names = [name for name in family.chosen(method) if method or family.METHODS[name].accuracy]
    run = Run("cpu", threads, out)
    journal = accuracy.Journal(None if run.folder is None else run.folder / "accuracy.jsonl")
    sources = {}
    for setting in accuracy.QUICK if quick else accuracy.SETTINGS:
        try:
            sources[setting] = accuracy.load(setting, data_dir)
        except BenchError as error:
            console.print(f"[yellow]left out {setting.title}: {error}[/]", soft_wrap=True)
    seconds = sum(accuracy.estimate(setting, source, names, seeds, journal) for setting, source in sources.items())
    done = f"; {len(journal.lines)} runs are in {journal.path}" if journal.lines else ""
    console.print(f"This takes about {seconds / 60:.0f} minutes in all, more on a busy machine{done}.", soft_wrap=True)
    results = []
    for setting, source in sources.items():
        with bar(setting.title) as progress:
            results.append(accuracy.run(setting, source, names, seeds, journal, progress))
        console.print(accuracy_report.table(results[-1]))
    run.write("accuracy", results)
    if run.folder is not None and results:
        accuracy_report.plot(results, run.folder / "accuracy.png", run.machine.title)


@app.command("host-cost")
def host_cost_command(
    peer: Annotated[str, typer.Option(help="Measure this peer; the default is this package.")] = "",
    rounds: RoundCount = HOST_ROUNDS,
    device: Device = "cpu",
    threads: Threads = 0,
    out: Out = None,
) -> None:
    """Measure what a step costs regardless of the tensors' size, with 10 to 10,000 tensors."""
    run = Run(device, threads, out)
    run.cost_on_host(peers.baseline(run.choose([peer] if peer else [])), rounds)
    run.finish()


@app.command("micro", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def micro(context: typer.Context, device: Device = "cpu") -> None:
    """Time both halves of a step separately with pytest-benchmark; further arguments go to pytest."""
    import pytest

    os.environ["BENCH_DEVICE"] = device_of(device).type
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={HERE}", str(HERE / "micro"), *context.args]
    raise typer.Exit(pytest.main(arguments))


def main(arguments: list[str]) -> int:
    """Run a command line, or `all` if it names no command. An error prints one line and returns code 2."""
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
