"""Times the kernels with other numbers than those of csrc/cuda/tuning.h that need no build.

    python tools/gpu_sweep.py --out DIR        writes DIR/sweep.json

They are the chunk size, the number of tensors around the ends of the small and the middle table, and the programs per
processor of Triton's reductions. Other threads per block and elements in flight need builds, whose compiler flags set
FUSED_SAM_THREADS and FUSED_SAM_ELEMENTS; tools/gpu_check.sh times them with gpu_kernels.py --quick --label NAME.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_tables import BOTH, CUDA, KINDS, SHAPES, Clock, Kind, head, passes, require_gpu, tables_of

from fused_sam.backends import choose
from fused_sam.backends.contract import Backend, Status

CHUNKS = [4096 << k for k in range(5)]
TENSORS = (64, 65, 224, 225)  # the small table's last number and one more, and the middle table's
PROGRAMS = (2, 4, 6, 8, 16)
PARTS = ("norm", "perturb", "sgd", "adam")


def times(backend: Backend, sizes: list[int], kind: Kind, clock: Clock) -> dict[str, float]:
    """Return the seconds of each primitive."""
    runs = passes(backend, tables_of(sizes, kind), kind, Status(CUDA))
    found = {}
    for part in PARTS:
        runs[part]()
        found[part] = clock.seconds(runs[part], 10)
    torch.cuda.empty_cache()
    return found


def chunks(clock: Clock) -> Iterator[dict[str, Any]]:
    from fused_sam.backends import cuda

    choose("cuda", CUDA)
    for chunk in CHUNKS:
        table = functools.partial(cuda.Cuda.module.Table, chunk=chunk)
        module = SimpleNamespace(**{**vars(cuda.Cuda.module), "Table": table})
        backend = type("Chunked", (cuda.Cuda,), {"module": module})()
        for shape in BOTH:
            for kind in KINDS[:2]:
                seconds = times(backend, SHAPES[shape], kind, clock)
                yield {"chunk": chunk, "shape": shape, "kind": kind.name, "seconds": seconds}


def tensors(clock: Clock) -> Iterator[dict[str, Any]]:
    backend = choose("cuda", CUDA)
    for count in TENSORS:
        sizes = [4096] * count
        runs = passes(backend, tables_of(sizes, KINDS[0]), KINDS[0], Status(CUDA))
        runs["sgd"]()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            runs["sgd"]()
        host = (time.perf_counter() - begin) / 100
        seconds = times(backend, sizes, KINDS[0], clock)
        yield {"tensors": count, "host_seconds_of_sgd": host, "seconds": seconds}


def programs(clock: Clock) -> Iterator[dict[str, Any]]:
    from fused_sam.backends.triton import device

    before = device.PROGRAMS
    try:
        for count in PROGRAMS:
            device.PROGRAMS = count
            for shape in BOTH:
                seconds = times(choose("triton", CUDA), SHAPES[shape], KINDS[0], clock)
                yield {"programs": count, "shape": shape, "seconds": {"norm": seconds["norm"]}}
    finally:
        device.PROGRAMS = before


SWEEPS: dict[str, Callable[[Clock], Iterator[dict[str, Any]]]] = {
    "chunks": chunks,
    "tensors": tensors,
    "programs": programs,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    require_gpu(parser)
    folder.mkdir(parents=True, exist_ok=True)
    clock, failed = Clock(), []
    report: dict[str, Any] = {**head(), "copy_rate": clock.copy_rate()}
    for name, sweep in SWEEPS.items():
        report[name] = []
        try:
            for row in sweep(clock):
                report[name].append(row)
                (folder / "sweep.json").write_text(json.dumps(report, indent=1) + "\n")
                rest = {key: value for key, value in row.items() if key != "seconds"}
                print(rest, {part: f"{s * 1e6:.1f} us" for part, s in row["seconds"].items()}, flush=True)
        except Exception as error:  # the other sweeps still count
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
    print(f"failed: {'; '.join(failed)}" if failed else "all was swept")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
