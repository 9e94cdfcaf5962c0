"""Tests of benchmarks on several processes: the memory of each process, and steps that are timed together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import distributed

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")

from bench import extra_memory, spread
from bench.__main__ import main
from bench.extra_memory import MODES, Mode, PlainMixed
from bench.work import example

gloo = pytest.mark.skipif(
    not (distributed.is_gloo_available() and hasattr(torch.cpu.Stream, "record_event")),
    reason="torch was built without gloo, or its FSDP2 shards on GPUs alone",
)
SHAPE = "3x40000"
# The limit allows for a status and a few 0-dim tensors of 4 to 8 bytes, per 120,000 parameters.
SLACK = 0.01


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.processes == 1], ids=lambda mode: mode.name)
def test_memory_beyond_the_base_optimizer(mode: Mode) -> None:
    (found,) = extra_memory.measure([mode], SHAPE)
    state = 4 if mode.base == "SGD" else 8
    masters = 4 if mode.precision == "masters" else 0
    assert found.plain == pytest.approx([state + masters], abs=SLACK)
    assert found.extra == pytest.approx([mode.expected], abs=SLACK)


def test_plain_mixed_precision_is_the_base_optimizer_on_fp32_copies() -> None:
    params = [extra_memory.as_bf16(param) for param in example([(7, 5), (33,)], torch.device("cpu"))]
    copies = [torch.nn.Parameter(param.detach().float()) for param in params]
    plain, expected = PlainMixed(params, "SGD", masters=True), torch.optim.SGD(copies, lr=0.1, momentum=0.9)
    for _ in range(3):
        for param, copy in zip(params, copies, strict=True):
            copy.grad = None if param.grad is None else param.grad.float()
        plain.step()
        expected.step()
    assert all(torch.equal(param, copy.bfloat16()) for param, copy in zip(params, copies, strict=True))


@gloo
def test_memory_on_two_processes(tmp_path: Path) -> None:
    modes = [mode for mode in MODES if mode.processes == 2]
    found = extra_memory.measure(modes, SHAPE)
    assert [extra.mode.way for extra in found] == ["DDP", "FSDP2"]
    for extra in found:
        share = 1 if extra.mode.way == "DDP" else 0.5
        assert extra.plain == pytest.approx([4 * share] * 2, abs=SLACK)
        assert extra.extra == pytest.approx([4 * share] * 2, abs=SLACK)


@gloo
def test_distributed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distributed", "--quick", "--processes", "2", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    (run,) = json.loads((folder / "distributed.json").read_text())["distributed"]
    assert (run["world"], run["local"]) == (2, 60_000)
    assert set(run["steps"]) == set(spread.WAYS)
    assert run["steps"]["FSDP2"]["count"] == 2
    assert (folder / "distributed.png").read_bytes().startswith(b"\x89PNG")
    assert "2 all-reduces" in capsys.readouterr().out
