"""Tests of the tools for a machine with a GPU that run without one: steps of the script, and targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = """#!/bin/sh
case "$*" in
  *"{failing}"*) printf 'words "quoted" \\ and\\ta tab\\n=====\\n\\n'; exit 3 ;;
esac
echo "ran $*"
"""


def check(tmp_path: Path, *stages: str, gpu: str = "Some GPU", failing: str = "nothing") -> tuple[int, dict[str, Any]]:
    """Run the script with stubs for Python, nvidia-smi and compute-sanitizer; return its exit status and summary."""
    programs = tmp_path / "bin"
    programs.mkdir()
    nvidia_smi = f"#!/bin/sh\necho '{gpu}'\n" if gpu else "#!/bin/sh\nexit 9\n"
    sanitizer = '#!/bin/sh\necho "sanitizer $*"\n'
    for name, text in (
        ("python", STUB.replace("{failing}", failing)), ("nvidia-smi", nvidia_smi), ("compute-sanitizer", sanitizer)
    ):  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"),
        "FUSED_SAM_SCRATCH": str(tmp_path / "scratch"), "FUSED_SAM_SECONDS": "100",
    }  # fmt: skip
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), str(tmp_path / "out"), *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert done.stdout.count("\n") > len(summary["steps"])
    return done.returncode, summary


def test_every_step_runs_in_a_fixed_order(tmp_path: Path) -> None:
    code, summary = check(tmp_path)
    steps = {row["step"]: row for row in summary["steps"]}
    assert code == 0 and summary["gpu"] == "Some GPU"
    assert list(steps) == [
        "machine", "build", "info", "cuda", "triton", "tests", "step", "ours", "ours_adamw", "targets", "kernels",
        "side_by_side", "adamw", "memcheck", "racecheck", "initcheck", "memory", "compiled", "micro",
    ]  # fmt: skip
    assert {row["result"] for row in steps.values()} == {"ok"}
    assert "ran -m pytest" in steps["tests"]["note"]
    assert "kernel_substring=fused_sam" in steps["memcheck"]["note"] + steps["racecheck"]["note"]
    assert "kernel_substring" not in steps["initcheck"]["note"], "what unchecked kernels write counts as unwritten"


@pytest.mark.parametrize(
    ("failing", "step", "last"),
    [
        ("setup.py", "build", "build"),
        ("))) cuda", "cuda", "cuda"),
        ("))) triton", "triton", "adamw"),
        ("-m pytest", "tests", "adamw"),
    ],
)
def test_the_last_line_of_a_failed_step_is_in_the_summary(tmp_path: Path, failing: str, step: str, last: str) -> None:
    """The run ends if the build or the CUDA backend is missing. No other failure ends it."""
    code, summary = check(tmp_path, "build", "tests", "bench", failing=failing)
    (failed,) = [row for row in summary["steps"] if row["result"] != "ok"]
    assert code == 1 and failed["step"] == step and summary["steps"][-1]["step"] == last
    assert failed["note"].endswith(f"{step}.log: words quoted  and a tab")


def test_steps_that_need_a_gpu_are_skipped_by_name_without_one(tmp_path: Path) -> None:
    _, summary = check(tmp_path, gpu="")
    skipped = [row["step"] for row in summary["steps"] if row["result"] == "skipped"]
    assert skipped == ["bench", "sanitizer", "more"]


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
    assert code == 1 and len(rows) == 12 and {row["met"] for row in rows.values()} == {None}
