"""Prints the results of tools/gpu_check.sh in at most 30 lines: python tools/gpu_report.py DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LINES = 30
SHAPES = ("134M in 128", "25.6M in 161")


def read(path: Path) -> Any:
    """Return the JSON of a file; an empty dict if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def of_steps(folder: Path) -> list[str]:
    """Return the steps in few lines, and every failure with its reason."""
    summary = read(folder / "summary.json")
    steps = summary.get("steps", [])
    by_result = {result: [row["step"] for row in steps if row["result"] == result] for result in ("ok", "skipped")}
    lines = [f"GPU {summary.get('gpu') or 'none'}, commit {summary.get('commit')}, {summary.get('seconds')} s"]
    lines += [f"{result}: {' '.join(names)}" for result, names in by_result.items() if names]
    lines += [
        f"{row['step']}: {row['passed']} passed, {row['skipped']} skipped, {row['failed']} failed"
        for row in steps
        if "passed" in row
    ]
    return lines + [f"FAILED {row['step']}: {row['note']}" for row in steps if row["result"] == "failed"]


def of_kernels(folder: Path) -> list[str]:
    """Return per shape and kind each pass's share of the copy rate."""
    lines = []
    for backend, name in (("cuda", "kernels"), ("triton", "kernels-triton")):
        rows = read(folder / f"{name}.json").get("rows", [])
        for shape in SHAPES:
            for kind in dict.fromkeys(row["kind"] for row in rows):
                mine = [r for r in rows if (r["shape"], r["kind"]) == (shape, kind) and " step" not in r["pass"]]
                shares = ", ".join(f"{r['pass']} {r['of_copy']:.0%}" for r in mine if "_step" not in r["pass"])
                lines += [f"{backend} {shape}, {kind}: {shares}"] if shares else []
    return [f"of copy_'s rate: {lines[0]}", *lines[1:]] if lines else []


def of_targets(folder: Path) -> list[str]:
    """Return how many targets are met, and each that is not."""
    rows = read(folder / "targets.json").get("targets", [])
    met = [row["met"] for row in rows]
    lines = [f"targets: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} unknown"] if rows else []
    return lines + [
        f"MISSED {row['what']}: {row['reached']:.4g}, target {row['target']}" for row in rows if row["met"] is False
    ]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    parts = [part(folder) for part in (of_steps, of_targets, of_kernels)]
    # The last part gives way first, then the one before.
    room = LINES
    for part in parts:
        for line in part[: room if len(part) <= room else max(room - 1, 0)]:
            print(line[:160])
        if 0 < room < len(part):
            print(f"... {len(part) - room + 1} lines more in all.tgz")
        room = max(room - len(part), 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
