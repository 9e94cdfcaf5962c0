"""Compares the measurements of tools/gpu_check.sh with the targets of the GPU backends.

    python tools/gpu_targets.py DIR

It reads step.json, kernels.json and the benchmarks' JSON in DIR/ours, and writes DIR/targets.json.

Each target has the number that was reached and a verdict; both are null, with the reason, if nothing was measured.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BACKENDS = ("cuda", "triton")
LARGE, MANY = "128x1048576", "resnet50"  # 134M parameters; 161 tensors
SLOWER_LARGE, SLOWER_MANY = 1.05, 1.5  # Triton's time over the CUDA backend's
MORE_MEMORY = 1.01
LAUNCHES = 3
HOST_SECONDS = 15e-6
COPY_FRACTION = 0.9
STEP_FRACTIONS = {"fp32": 0.95, "bf16": 0.9}  # of a step in 3 launches with SGD, by the kind of params


def outcome(what: str, relation: str, limit: float, reached: float | None, why: str = "") -> dict[str, Any]:
    """Return one target as a row of the JSON file."""
    met = None
    if reached is not None:
        met = {"<=": reached <= limit, "<": reached < limit, "==": reached == limit, ">=": reached >= limit}[relation]
    return {"what": what, "target": f"{relation} {limit:g}", "reached": reached, "met": met, "why": why}


def dig(found: Any, *keys: str) -> Any:
    """Return the value under the keys; None if one of them is missing."""
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def of_step(step: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of step.json."""
    rows = []
    for backend in BACKENDS:
        names = dig(step, backend, "launches", "check_update=False")
        why = dig(step, backend, "launches", "error") or "; ".join(name[:60] for name in names or [])
        what = f"{backend}: launches of a step of 161 tensors, check_update=False"
        rows.append(outcome(what, "==", LAUNCHES, None if names is None else len(names), why))
        captured = dig(step, backend, "captured") or {}
        differ = captured.get("differ") if captured.get("finite", False) else None
        why = captured.get("error", "") or ("" if differ is not None or not captured else "weights are not finite")
        what = f"{backend}: elements that differ between captured and eager steps"
        rows.append(outcome(what, "==", 0, differ, why))
    kept = [dig(step, backend, "memory", "kept") for backend in BACKENDS]
    more = None if None in kept else kept[1] / kept[0]
    why = "; ".join(filter(None, (dig(step, backend, "memory", "error") for backend in BACKENDS)))
    rows.append(outcome("triton: memory kept by a step, over cuda's", "<=", MORE_MEMORY, more, why))
    seconds, why = dig(step, "triton", "host_seconds", "launch"), dig(step, "triton", "host_seconds", "error") or ""
    rows.append(outcome("triton: host time of a launch, seconds", "<", HOST_SECONDS, seconds, why))
    return rows


def of_kernels(kernels: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of kernels.json."""
    found = {
        row["kind"]: row["of_copy"]
        for row in kernels.get("rows", [])
        if row["elements"] == 128 << 20 and row["pass"] == "sgd step in 3 launches"
    }
    return [
        outcome(
            f"cuda: bytes per second of a SAM + SGD step over copy_'s, 134M {kind}", ">=", limit, found.get(kind),
            "" if kind in found else "not measured",
        )
        for kind, limit in STEP_FRACTIONS.items()
    ]  # fmt: skip


def of_comparisons(base: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets of a benchmark's runs, by shape. The CUDA backend is their baseline."""
    rows = []
    limits = {LARGE: SLOWER_LARGE, MANY: SLOWER_MANY}
    for shape, limit in limits.items():
        run = runs.get(shape)
        ratio = dig(run, "peers", "ours-triton", "ratio") if run and run["baseline"] == "ours-cuda" else None
        interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}" if ratio else "not measured"
        what = f"triton: time of a SAM + {base} step over cuda's, {shape}"
        rows.append(outcome(what, "<=", limit, ratio and ratio["value"], interval))
    if base == "AdamW":
        for backend in BACKENDS:
            run = runs.get(LARGE)
            share, ratio = dig(run, "copy_fraction", "value"), dig(run, "peers", f"ours-{backend}", "ratio", "value")
            reached = None if share is None or ratio is None or run["baseline"] != "ours-cuda" else share / ratio
            what = f"{backend}: bytes per second of a SAM + AdamW step over copy_'s, {LARGE}"
            rows.append(outcome(what, ">=", COPY_FRACTION, reached, "" if reached else "not measured"))
    return rows


def comparisons(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the runs of the benchmark's files of that name, in the folder of any machine."""
    runs = {}
    for path in sorted(folder.glob(f"ours/*/{name}.json")):
        runs.update({run["shape"]: run for run in json.loads(path.read_text())["side_by_side"]})
    return runs


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    step, kernels = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (folder / "step.json", folder / "kernels.json")
    )
    rows = of_kernels(kernels) + of_step(step)
    for base, name in (("SGD", "side_by_side"), ("AdamW", "adamw_side_by_side")):
        rows += of_comparisons(base, comparisons(folder, name))
    first = {"device": step.get("device"), "commit": step.get("commit") or os.environ.get("FUSED_SAM_COMMIT")}
    (folder / "targets.json").write_text(json.dumps({**first, "targets": rows}, indent=1) + "\n")
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: "unknown"}[row["met"]]
        reached = "-" if row["reached"] is None else f"{row['reached']:.4g}"
        why = f" ({row['why']})" if row["why"] else ""
        print(f"{verdict:8} {reached:>10}  {row['target']:10} {row['what']}{why}")
    met = [row["met"] for row in rows]
    print(f"{met.count(True)} of {len(met)} targets met, {met.count(False)} missed, {met.count(None)} unknown")
    return 1 if None in met else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
