"""Tests of the tools for a machine with a GPU that run without one: steps of the script, and targets."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# A Python that runs nothing but the report. A test run writes what pytest's --junitxml does.
STUB = """#!/bin/sh
case "$*" in
  *gpu_report.py*) exec "{python}" "$@" ;;
  *"{failing}"*) printf 'words "quoted" \\ and\\ta tab\\n=====\\n\\n'; exit 3 ;;
  *"{hanging}"*) trap '' TERM; echo "begins"; sleep 60 & wait; sleep 60 ;;
esac
for word in "$@"; do
  case "$word" in
    --junitxml=*) echo '<testsuite name="pytest" errors="0" failures="0" skipped="{skipped}" tests="5" time="1">' \
      >"${word#--junitxml=}" ;;
  esac
done
echo "ran $* of commit $FUSED_SAM_COMMIT"
"""
STEPS = [
    "smoke_triton", "machine", "build", "info", "smoke_cuda", "tests_cuda", "tests_triton",
    "kernels", "kernels_triton", "step", "ours", "ours_adamw", "targets", "side_by_side", "adamw",
    "profile_134", "profile_25", "sweep", "build_threads128", "threads128", "build_threads512", "threads512",
    "build_elements32", "elements32", "memcheck", "racecheck", "initcheck", "memory", "compiled", "micro",
]  # fmt: skip
WITHOUT_CUDA = ["smoke_cuda", "tests_cuda", "kernels", "profile", "sweep", "variants", "sanitizer"]


def check(
    tmp_path: Path, *stages: str, gpu: str = "Some GPU", seconds: int = 200, **how: Any
) -> tuple[int, dict[str, Any], str]:
    """Run the script with stubs for all programs. Return its exit status, its summary and its last 30 lines."""
    programs = tmp_path / "bin"
    programs.mkdir()
    words = {"failing": "nothing", "hanging": "nothing", "skipped": 1, "python": sys.executable, **how}
    stub = STUB
    for name, value in words.items():
        stub = stub.replace("{" + name + "}", str(value))
    nvidia_smi = f"#!/bin/sh\necho '{gpu}'\n" if gpu else "#!/bin/sh\nexit 9\n"
    runs_rest = '#!/bin/sh\necho "{} $*"\n'
    for name, text in (
        ("python", stub), ("nvidia-smi", nvidia_smi), ("compute-sanitizer", runs_rest.format("sanitizer")),
        ("ncu", runs_rest.format("ncu")),
    ):  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"),
        "FUSED_SAM_SCRATCH": str(tmp_path / "scratch"), "FUSED_SAM_SECONDS": str(seconds), "FUSED_SAM_GRACE": "1",
        "FUSED_SAM_COMMIT": "abc123",
    }  # fmt: skip
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), str(tmp_path / "out"), *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    report = (tmp_path / "out" / "report.txt").read_text()
    assert done.stdout.endswith(report) and len(report.splitlines()) <= 30
    with tarfile.open(tmp_path / "out" / "all.tgz") as tar:
        packed = {Path(name).name for name in tar.getnames()}
    assert {"summary.json", "report.txt"} <= packed and "all.tgz" not in packed
    return done.returncode, summary, report


def test_every_step_runs_in_a_fixed_order(tmp_path: Path) -> None:
    code, summary, report = check(tmp_path)
    steps = {row["step"]: row for row in summary["steps"]}
    assert code == 0 and summary["gpu"] == "Some GPU" and summary["commit"] == "abc123"
    assert list(steps) == STEPS
    assert {row["result"] for row in steps.values()} == {"ok"}
    for backend in ("cuda", "triton"):
        row, log = steps[f"tests_{backend}"], (tmp_path / "out" / f"tests_{backend}.log").read_text()
        assert f"tests/test_{backend}_gpu.py" in log and log.endswith("of commit abc123\n")
        assert (row["passed"], row["skipped"], row["failed"]) == (4, 1, 0)
    assert "kernel_substring=fused_sam" in steps["memcheck"]["note"] + steps["racecheck"]["note"]
    assert "kernel_substring" not in steps["initcheck"]["note"], "what unchecked kernels write counts as unwritten"
    assert "commit abc123" in report and "tests_cuda: 4 passed, 1 skipped, 0 failed" in report


@pytest.mark.parametrize(
    ("failing", "step"), [("gpu_smoke.py cuda", "smoke_cuda"), ("gpu_smoke.py triton", "smoke_triton"),
                          ("test_cuda_gpu.py", "tests_cuda"), ("gpu_step.py", "step")]
)  # fmt: skip
def test_a_failed_step_ends_nothing_and_its_last_line_is_in_the_summary(
    tmp_path: Path, failing: str, step: str
) -> None:
    code, summary, report = check(tmp_path, "smoke", "tests", "bench", failing=failing)
    (failed,) = [row for row in summary["steps"] if row["result"] != "ok"]
    assert code == 1 and failed["step"] == step
    assert [row["step"] for row in summary["steps"]] == STEPS[:15]
    assert failed["note"].endswith(f"{step}.log: words quoted  and a tab")
    assert f"FAILED {step}: exit status 3" in report


def test_triton_is_measured_when_the_build_fails(tmp_path: Path) -> None:
    code, summary, report = check(tmp_path, failing="setup.py")
    results = {row["step"]: row["result"] for row in summary["steps"]}
    assert code == 1 and results["build"] == "failed"
    assert [step for step, result in results.items() if result == "skipped"] == WITHOUT_CUDA
    for step in ("smoke_triton", "tests_triton", "kernels_triton", "ours", "targets"):
        assert results[step] == "ok"
    assert "ours-cuda" not in next(row["note"] for row in summary["steps"] if row["step"] == "ours")
    assert "FAILED build: exit status 3, see build.log" in report


def test_tests_that_all_skip_are_a_failure(tmp_path: Path) -> None:
    _, summary, _ = check(tmp_path, "tests", skipped=5)
    rows = {row["step"]: row for row in summary["steps"]}
    for backend in ("cuda", "triton"):
        assert rows[f"tests_{backend}"]["result"] == "failed"
        assert rows[f"tests_{backend}"]["note"].startswith("nothing was tested")


def test_a_step_that_hangs_is_ended_and_the_others_run(tmp_path: Path) -> None:
    begin = time.monotonic()
    _, summary, _ = check(tmp_path, "smoke", hanging="gpu_smoke.py triton", seconds=7)
    rows = {row["step"]: row for row in summary["steps"]}
    assert rows["smoke_triton"]["result"] == "failed" and "ended after 7 s: begins" in rows["smoke_triton"]["note"]
    assert rows["build"]["result"] == "skipped" and "no time left of 7 s" in rows["build"]["note"]
    assert time.monotonic() - begin < 50


@pytest.fixture(params=["gpu_smoke", "gpu_kernels", "gpu_launches", "gpu_sweep", "gpu_step"])
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(request.param)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_tool_fails_with_one_line(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"gpu_smoke": ["triton", "--out", str(tmp_path)], "gpu_launches": []}
    name = tool.__name__
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.get(name, ["--out", str(tmp_path)])])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and said[-1] == f"{name}.py: error: there is no GPU that torch can use"


def test_the_smoke_test_finds_a_wrong_primitive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, against a backend that is right, and one whose update is off by 1 in 1,000."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT))
    from fused_sam.backends.foreach import Foreach

    smoke = importlib.import_module("gpu_smoke")
    tables = importlib.import_module("gpu_tables")
    cpu = torch.device("cpu")
    monkeypatch.setattr(smoke, "CUDA", cpu)
    monkeypatch.setattr(smoke, "tables_of", lambda sizes, kind: tables.tables_of(sizes, kind, cpu))

    class Wrong(Foreach):
        def update(self, table: Any, *rest: Any) -> None:
            super().update(table, *rest)
            table.params[-1].mul_(1.001)

    kinds = [kind for kind in tables.KINDS if kind.name in smoke.CHECKED]
    assert len(kinds) == len(smoke.CHECKED)
    for kind in kinds:
        for part in ("norm", "perturb", "sgd", "adam"):
            assert smoke.difference(Foreach(), kind, part) <= smoke.LIMITS[kind.param]
    assert smoke.difference(Wrong(), kinds[0], "sgd") > smoke.LIMITS[torch.float32]


def test_bytes_and_alignment_of_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT))
    tables = importlib.import_module("gpu_tables")
    traffic = {kind.name: [kind.traffic(part) for part in ("norm", "perturb", "sgd", "adam")] for kind in tables.KINDS}
    assert traffic["fp32"] == [4, 16, 20, 28] and traffic["fp16"] == traffic["bf16"] == [2, 8, 14, 22]
    assert traffic["bf16 with fp32 masters"] == [2, 8, 20, 28]
    for kind in tables.KINDS:
        table = tables.tables_of([5, 64], kind, torch.device("cpu"))["sgd"]
        off = {t.data_ptr() % 16 for t in table.grads}
        assert off == ({kind.grad.itemsize} if kind.misaligned else {0}), kind.name


STEP: dict[str, Any] = {
    "device": "Some GPU",
    "cuda": {
        "launches": {"check_update=False": ["norm", "perturb", "sgd"]},
        "captured": {"differ": 0, "finite": True},
        "memory": {"kept": 1000},
    },
    "triton": {
        "launches": {"check_update=False": ["norm", "perturb", "Memcpy", "sgd"]},
        "captured": {"error": "RuntimeError: no graph"},
        "memory": {"kept": 1005},
        "host_seconds": {"launch": 9e-6},
    },
}


def compared(base: str, shape: str, ratio: float) -> dict[str, Any]:
    return {
        "shape": shape, "base": base, "baseline": "ours-cuda", "copy_fraction": {"value": 0.92},
        "peers": {
            "ours-cuda": {"ratio": {"value": 1.0, "low": 1.0, "high": 1.0}},
            "ours-triton": {"ratio": {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}},
        },
    }  # fmt: skip


def targets(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    command = [sys.executable, str(ROOT / "tools" / "gpu_targets.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (folder / "targets.json").exists(), done.stderr
    rows = json.loads((folder / "targets.json").read_text())["targets"]
    return done.returncode, {row["what"]: row for row in rows}


def test_targets_are_numbers_with_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    kernels = [
        {"kind": kind, "elements": 1 << 27, "pass": name, "of_copy": of_copy}
        for kind, of_copy in (("fp32", 0.96), ("bf16", 0.89), ("fp16", 0.5))
        for name in ("perturb", "sgd step in 3 launches")
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": kernels}))
    folder = tmp_path / "ours" / "some-gpu"
    folder.mkdir(parents=True)
    for name, base in (("side_by_side", "SGD"), ("adamw_side_by_side", "AdamW")):
        runs = [compared(base, "128x1048576", 1.04), compared(base, "resnet50", 1.6)]
        (folder / f"{name}.json").write_text(json.dumps({"side_by_side": runs}))
    code, rows = targets(tmp_path)
    found = {what: (row["reached"], row["met"]) for what, row in rows.items()}
    launches = "launches of a step of 161 tensors, check_update=False"
    differ = "elements that differ between captured and eager steps"
    assert found == {
        "cuda: bytes per second of a SAM + SGD step over copy_'s, 134M fp32": (0.96, True),
        "cuda: bytes per second of a SAM + SGD step over copy_'s, 134M bf16": (0.89, False),
        f"cuda: {launches}": (3, True),
        f"triton: {launches}": (4, False),
        f"cuda: {differ}": (0, True),
        f"triton: {differ}": (None, None),
        "triton: memory kept by a step, over cuda's": (1.005, True),
        "triton: host time of a launch, seconds": (9e-6, True),
        "triton: time of a SAM + SGD step over cuda's, 128x1048576": (1.04, True),
        "triton: time of a SAM + SGD step over cuda's, resnet50": (1.6, False),
        "triton: time of a SAM + AdamW step over cuda's, 128x1048576": (1.04, True),
        "triton: time of a SAM + AdamW step over cuda's, resnet50": (1.6, False),
        "cuda: bytes per second of a SAM + AdamW step over copy_'s, 128x1048576": (0.92, True),
        "triton: bytes per second of a SAM + AdamW step over copy_'s, 128x1048576": (0.92 / 1.04, False),
    }
    assert rows[f"triton: {differ}"]["why"] == "RuntimeError: no graph"
    assert rows[f"triton: {launches}"]["why"] == "norm; perturb; Memcpy; sgd"
    assert code == 1, "one is unknown"


def test_targets_without_results_are_unknown(tmp_path: Path) -> None:
    code, rows = targets(tmp_path)
    assert code == 1 and len(rows) == 14 and {row["met"] for row in rows.values()} == {None}
