"""Tests of the benchmarks: shapes, agreement of the compared packages, statistics, and files of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")

from bench import agreement, host_cost, memory, rounds, shapes, stats, traffic
from bench.__main__ import main
from bench.clock import HostClock
from bench.errors import BenchError
from bench.hyper import AdamHyper, Hyper
from bench.peers import PEERS, WRONG_IN_BF16, choose
from bench.side_by_side import build

CPU = torch.device("cpu")
ON_CPU = [name for name in PEERS if name not in ("compiled", "ours-cuda", "ours-triton")]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet18", 62, 11_689_512),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("transformer24m", 26, 24_110_400),
        ("1000x256", 1000, 256_000),
    ],
)
def test_shapes_hold_the_parameters_of_the_network(name: str, tensors: int, parameters: int) -> None:
    assert len(shapes.by_name(name)) == tensors
    assert shapes.numel(shapes.by_name(name)) == parameters


@pytest.mark.parametrize(
    "hyper",
    [
        Hyper(),
        Hyper(rho=0.7, lr=0.03, momentum=0.6, weight_decay=0.02, nesterov=True),
        Hyper(rho=0.2, momentum=0.8, dampening=0.3, weight_decay=0.0),
        AdamHyper(rho=0.3, lr=0.02, beta1=0.8, beta2=0.9, weight_decay=0.1),
    ],
)
def test_peers_agree(hyper: Hyper) -> None:
    peers = build(ON_CPU, "7x33", CPU, hyper)
    agreement.check(peers, shapes.by_name("7x33"), steps=5)


@pytest.mark.parametrize("wrong", [Hyper(rho=0.06), Hyper(weight_decay=1e-3), Hyper(momentum=0.91)])
def test_a_peer_that_computes_something_else_gets_no_ratio(wrong: Hyper) -> None:
    peers = build(["per-tensor"], "7x33", CPU, Hyper())
    peers["wrong"] = build(["foreach"], "7x33", CPU, wrong)["foreach"]
    with pytest.raises(BenchError, match="no ratio: wrong disagrees with per-tensor at step"):
        agreement.check(peers, shapes.by_name("7x33"))


def test_the_guard_does_not_change_the_gradients() -> None:
    peers = build(["per-tensor", "foreach"], "2x5", CPU, Hyper())
    before = [param.grad.clone() for _, params in peers.values() for param in params if param.grad is not None]
    agreement.check(peers, shapes.by_name("2x5"))
    after = [param.grad for _, params in peers.values() for param in params]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b is not None)


def test_summary_gives_order_statistics() -> None:
    assert stats.summary(np.array([5.0, 1.0, 3.0, 2.0, 4.0])) == stats.Summary(5, 3.0, 2.0, 4.0, 1.0, 5.0)


def test_ratio_of_medians_and_its_interval() -> None:
    bottom = np.random.default_rng(1).normal(1.0, 0.1, 50)
    exact = stats.ratio_of_medians(2 * bottom, bottom)
    assert exact.low == exact.high == exact.value == 2.0
    noisy = stats.ratio_of_medians(np.random.default_rng(2).normal(3.0, 0.3, 50), bottom)
    assert noisy.low < noisy.value < noisy.high
    assert noisy.low < 3.0 < noisy.high


def test_line_through_samples_of_all_magnitudes() -> None:
    counts = np.array([10.0, 100.0, 1000.0, 10000.0])
    line = stats.fit_line(counts, 20 + 0.5 * counts)
    assert line.intercept == pytest.approx(20)
    assert line.slope == pytest.approx(0.5)
    assert line.worst == pytest.approx(0, abs=1e-9)
    assert stats.fit_line(counts, 1e-3 * counts**2).worst > 0.5


def test_bytes_of_a_step() -> None:
    assert (traffic.step_bytes(10), traffic.copy_bytes(10)) == (440, 80)
    assert traffic.step_bytes(10, base=torch.optim.AdamW) == 520
    # bf16 weights have nine passes of two bytes. The fp32 momentum is read and written.
    assert (traffic.step_bytes(10, 2), traffic.copy_bytes(10, 2)) == (260, 40)


@pytest.mark.parametrize("peer", ["ours-cpu", "in-place"])
def test_memory_of_a_step_is_one_backup(peer: str) -> None:
    usage = memory.measure(peer, "3x100000", CPU, Hyper())
    assert usage.weights <= usage.kept < 1.01 * usage.weights
    assert usage.temporary < usage.smallest_tensor / 100


def test_memory_of_clones_is_counted() -> None:
    usage = memory.measure("per-tensor", "3x100000", CPU, Hyper())
    assert usage.kept < 0.01 * usage.weights
    assert usage.temporary > usage.weights
    assert usage.largest == usage.smallest_tensor


@pytest.mark.parametrize(("hyper", "update"), [(Hyper(), "sgd"), (AdamHyper(), "adam")])
def test_host_cost_leaves_out_every_kernel_of_a_step(
    hyper: Hyper, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pytest.importorskip("fused_sam._cpu").Table
    plain = {name: getattr(table, name) for name in host_cost.KERNELS}
    called: list[str] = []
    for name, kernel in plain.items():
        monkeypatch.setattr(
            table, name, lambda *args, name=name, kernel=kernel: (called.append(name), kernel(*args))[1]
        )
    peer, _ = build(["ours-cpu"], "3x5", CPU, hyper)["ours-cpu"]
    with host_cost.kernel_stopwatch() as spent:
        peer.first_step()
        peer.second_step()
    assert called == ["norm", "perturb", "norm", update]
    assert len(spent) == 4 and min(spent) > 0
    peer.first_step()
    assert len(spent) == 4, "the kernels are the plain ones again"


def test_host_cost_of_the_step_and_beyond_the_kernels() -> None:
    pytest.importorskip("fused_sam._cpu")
    cost = host_cost.measure("ours-cpu", CPU, Hyper(), rounds=2, counts=(3, 10), shapes=("4x7",))
    assert [step.count for step in cost.steps] == [2, 2]
    assert 0 < cost.beside_kernels["4x7"].median < 1
    assert set(cost.as_json()) == {"peer", "counts", "steps", "line", "beside_kernels"}


def test_the_usual_peers_all_run_on_a_cpu() -> None:
    chosen, notes = choose(CPU, [])
    assert chosen == [name for name, peer in PEERS.items() if "cpu" in peer.default_on]
    assert notes == []


@pytest.mark.parametrize("half", ["first_step", "second_step"])
def test_the_other_half_ends_outside_the_clock(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the work continues after the call has returned."""
    from types import SimpleNamespace

    pytest.importorskip("pytest_benchmark")
    from bench.micro import test_steps as micro

    seen: list[str] = []
    peer = SimpleNamespace(**{name: lambda name=name: seen.append(name) for name in ("first_step", "second_step")})

    def pedantic(target: Any, args: Any, rounds: int, setup: Any = None, teardown: Any = None) -> None:
        if setup:
            setup()
        seen.append("begin")
        target(*args)
        seen.append("end")
        if teardown:
            teardown(*args)

    monkeypatch.setattr(micro, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    micro.test_step(SimpleNamespace(pedantic=pedantic), "161x1", peer, half)  # type: ignore[arg-type]
    other = {"first_step": ["second_step", "wait"], "second_step": ["first_step", "wait"]}[half]
    timed = ["begin", half, "wait", "end"]
    assert seen == (timed + other if half == "first_step" else other + timed)


def test_no_device_compiles_for_minutes_by_default() -> None:
    assert PEERS["compiled"].default_on == ()
    assert "compiled" not in choose(CPU, [])[0]
    assert "compiled" in choose(CPU, [], compiled=True)[0]


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import side_by_side

    compare = side_by_side.compare
    monkeypatch.setattr(
        "bench.run.side_by_side.compare", lambda shape, *args: 1 // 0 if shape == "3x5" else compare(shape, *args)
    )
    arguments = ["side-by-side", "--rounds", "2", "--out", str(tmp_path), "--peer", "ours-cpu"]
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--shape", "2x5", "--shape", "3x5"])
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "side_by_side.json").read_text())["side_by_side"]
    assert run["shape"] == "2x5"


def test_command_line_writes_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["--peer", "per-tensor", "--peer", "ours-cpu"]
    assert main(["side-by-side", "--shape", "10x256", "--rounds", "2", "--out", str(tmp_path), *peers]) == 0
    (folder,) = tmp_path.iterdir()
    written = json.loads((folder / "side_by_side.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    (run,) = written["side_by_side"]
    assert (run["shape"], run["numel"], run["baseline"]) == ("10x256", 2560, "ours-cpu")
    assert run["peers"]["per-tensor"]["step"]["count"] == 2
    assert run["peers"]["ours-cpu"]["ratio"]["value"] == 1
    assert (folder / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert "fused_sam (cpu)" in capsys.readouterr().out


def test_adamw_writes_files_of_its_own(tmp_path: Path) -> None:
    assert main(["adamw", "--shape", "10x256", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "adamw_side_by_side.json").read_text())["side_by_side"]
    assert (run["base"], run["dtype"], run["step_bytes"]) == ("AdamW", "float32", 52 * 2560)
    assert {"per-tensor", "foreach-fused", "ours-cpu"} <= set(run["peers"])
    assert run["peers"]["foreach-fused"]["label"] == "foreach SAM + AdamW(fused)"
    assert (folder / "adamw_ratios.png").exists()


def test_bf16_leaves_out_the_peers_that_are_wrong_there(tmp_path: Path) -> None:
    assert main(["side-by-side", "--bf16", "--shape", "10x256", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "bf16_side_by_side.json").read_text())["side_by_side"]
    assert (run["dtype"], run["step_bytes"]) == ("bfloat16", 26 * 2560)
    assert {"foreach", "ours-cpu"} <= set(run["peers"])
    assert not set(WRONG_IN_BF16) & set(run["peers"])


def test_a_turn_is_taken_once_per_round_and_repeated_inside() -> None:
    seen: list[str] = []
    turns = {name: [lambda name=name: seen.append(name)] * 2 for name in "ab"}
    samples = rounds.interleave(turns, HostClock(), rounds=3, repeats=4)
    assert {name: values.shape for name, values in samples.items()} == {"a": (3, 2), "b": (3, 2)}
    assert [len(set(seen[start : start + 8])) for start in range(0, 48, 8)] == [1] * 6
    assert seen.count("a") == seen.count("b") == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["side-by-side", "--shape", "resnet34"], "unknown shape 'resnet34': choose transformer24m, "),
        (["side-by-side", "--shape", "0x256"], "unknown shape '0x256'"),
        (["side-by-side", "--peer", "ours"], "unknown peer 'ours': choose from per-tensor, "),
        (["memory", "--shape", "nothing"], "unknown shape 'nothing'"),
        (["adamw", "--peer", "compiled", "--shape", "2x5"], "peer compiled cannot run on cpu: it is written for SGD"),
        (["methods", "--method", "sharp"], "unknown method 'sharp': choose from sgd, "),
        (["methods", "--network", "rnn"], "unknown network 'rnn': choose from cnn, mlp"),
        (["accuracy", "--method", "sharp"], "unknown method 'sharp'"),
        (["distributed", "--shape", "nothing"], "unknown shape 'nothing'"),
        (["--device", "tpu"], "unknown device 'tpu': choose cpu or cuda"),
    ],
)
def test_an_impossible_request_ends_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
