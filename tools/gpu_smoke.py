"""Checks one GPU backend in seconds: each primitive against the reference, and its rate at 134M fp32 parameters.

    python tools/gpu_smoke.py BACKEND --out DIR        writes DIR/smoke-BACKEND.json

Every result is printed at once. The exit status is 1 if a primitive differs from the reference.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_tables import CUDA, KINDS, LARGE, SHAPES, UPDATES, Clock, Kind, head, passes, require_gpu, tables_of
from torch import Tensor

from fused_sam.backends import choose
from fused_sam.backends.contract import ASCENT_NORM, INVERSE_NORM, Backend, Status, Table
from fused_sam.backends.reference import Reference

SIZES = [1, 7, 4097, 50_000]
CHECKED = ("fp32", "bf16", "fp16", "fp32, misaligned grads")
PARTS = ("norm", "perturb", *UPDATES)
# Of the largest number of a tensor. Lion's sign may change where rounding decides it, so that it is not compared.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}


def moved(table: Table, device: str) -> Table:
    """Return a copy of a table on another device."""
    there = copy.copy(table)
    for name in ("params", "backups", "masters", "grads"):
        setattr(there, name, [t.to(device, copy=True) for t in getattr(table, name)])
    there.state = {
        name: [None if t is None else t.to(device, copy=True) for t in column] for name, column in table.state.items()
    }
    there.native = None
    return there


def numbers(table: Table) -> list[Tensor]:
    """Return all that a primitive may have written."""
    state = [t for column in table.state.values() for t in column if t is not None]
    return [t.detach().float().cpu() for t in (*table.params, *table.backups, *table.masters, *state)]


def difference(backend: Backend, kind: Kind, part: str) -> float:
    """Return the largest difference of a primitive from the reference, over the largest number of its tensor."""
    torch.manual_seed(1)
    tables = tables_of(SIZES, kind)
    twins = {name: moved(table, "cpu") for name, table in tables.items()}
    status, wanted = Status(CUDA), Status(torch.device("cpu"))
    for one in (status, wanted):
        one.values[INVERSE_NORM] = 0.125
    passes(backend, tables, kind, status)[part]()
    passes(Reference(), twins, kind, wanted)[part]()
    if part == "norm":
        ours, right = float(status.values[ASCENT_NORM]), float(wanted.values[ASCENT_NORM])
        return abs(ours / right - 1)
    name = part if part in UPDATES else "sgd"
    pairs = zip(numbers(tables[name]), numbers(twins[name]), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    require_gpu(parser)
    arguments.out.mkdir(parents=True, exist_ok=True)
    backend = choose(arguments.backend, CUDA)
    report: dict[str, Any] = {**head(), "backend": arguments.backend, "differences": {}, "rates": {}}
    print(f"{report['device']}, torch {report['torch']}, commit {report['commit']}", flush=True)
    wrong = []

    def save() -> None:
        (arguments.out / f"smoke-{arguments.backend}.json").write_text(json.dumps(report, indent=1) + "\n")

    for kind in (k for k in KINDS if k.name in CHECKED):
        for part in PARTS:
            if part == "lion":
                continue
            found = difference(backend, kind, part)
            right = found <= (1e-5 if part == "norm" else LIMITS[kind.param])
            report["differences"][f"{part}, {kind.name}"] = found
            print(f"{'right' if right else 'WRONG'}  {part:8} {kind.name:24} differs by {found:.1e}", flush=True)
            wrong += [] if right else [f"{part} of {kind.name}"]
            save()
    clock = Clock()
    copy_rate = report["copy_rate"] = clock.copy_rate()
    runs = passes(backend, tables_of(SHAPES[LARGE], KINDS[0]), KINDS[0], Status(CUDA))
    for part in PARTS:
        runs[part]()
        rate = report["rates"][part] = sum(SHAPES[LARGE]) * KINDS[0].traffic(part) / clock.seconds(runs[part], 10)
        print(f"{part:8} 134M fp32 {rate / 1e9:7.0f} GB/s, {rate / copy_rate:6.1%} of copy", flush=True)
        save()
    print(f"{arguments.backend}: " + (f"WRONG: {', '.join(wrong)}" if wrong else "every primitive is right"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
