"""Times each CUDA kernel of a SAM step on the GPU at hand, beside torch's device-to-device copy in the same run.

    python tools/gpu_kernels.py --out DIR        writes DIR/kernels.json, and DIR/kernels.png where matplotlib is

The caches are cold when a pass of the step begins, as they are after a backward pass. docs/gpu.md has the predictions.
"""

from __future__ import annotations

import argparse
import json
import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends import choose
from fused_sam.backends.contract import SKIP, STATUS_SIZE, Group, Table

ROUNDS = 20
SHAPES = {
    "1000 x 256": [256] * 1000,
    # ResNet-18: norms' vectors, four stages of 3 x 3 convolutions, three shortcuts, the first and the last layer.
    "11.7M in 62": [64] * 10 + [128] * 10 + [256] * 10 + [512] * 10 + [36864] * 4 + [73728] + [147456] * 3 + [294912]
    + [589824] * 3 + [1179648] + [2359296] * 3 + [8192, 32768, 131072, 9408, 512000, 1000],
    "25.6M in 161": [159_000] * 160 + [117_000],
    "134M in 128": [1 << 20] * 128,
    "537M in 128": [1 << 22] * 128,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What a table is made of, and how many bytes an element each primitive then moves."""

    name: str
    weight: torch.dtype
    gradient: torch.dtype
    model: torch.dtype | None = None  # beside fp32 master weights
    stochastic: bool = False
    shapes: tuple[str, ...] = tuple(SHAPES)

    def traffic(self, primitive: str) -> int:
        w, g, m = self.weight.itemsize, self.gradient.itemsize, (self.model or self.weight).itemsize
        kept = w if self.model else 0  # the master weight, read and written
        return {
            "norm": g,
            "perturb": w + g + m + (0 if self.model else w),
            "sgd": w + g + m + kept + 2 * 4,
            "adam": w + g + m + kept + 4 * 4,
        }[primitive]


F32, BF16 = torch.float32, torch.bfloat16
LARGE = ("25.6M in 161", "134M in 128")
KINDS = [
    Kind("fp32", F32, F32),
    Kind("bf16", BF16, BF16),
    Kind("bf16, random rounding", BF16, BF16, stochastic=True, shapes=LARGE),
    Kind("bf16 with fp32 masters", F32, BF16, model=BF16, shapes=LARGE),
]


def seconds_of(run: Callable[[], Any], flush: Tensor) -> float:
    """Median time on the stream with cold caches; writing `flush` takes long enough for the host to be ahead."""
    times = []
    for _ in range(ROUNDS):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def measure(name: str, kind: Kind, flush: Tensor, copy_rate: float) -> list[dict[str, Any]]:
    def column(like: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, device="cuda").to(like) for n in SHAPES[name]]

    backend = choose("cuda", torch.device("cuda"))
    rows_of_table = len(SHAPES[name])
    table = Table(column(kind.weight), [i % 2 for i in range(rows_of_table)], kind.gradient)
    if kind.model is None:
        table.backups = column(kind.weight)
    else:
        table.models = column(kind.model)
    table.stochastic, table.streams = kind.stochastic, list(range(rows_of_table))
    table.momenta, table.squares, table.gradients = [*column(F32)], column(F32), column(kind.gradient)
    for v in table.squares:
        v.square_()
    table.largest = [None] * rows_of_table
    table.steps = [torch.zeros((), device="cuda") for _ in range(rows_of_table)]
    table.gradient_addresses = array("q", [g.data_ptr() for g in table.gradients])
    groups = [Group(0.05, False, 0.0, 0.1, 0.9, 0.0, 1e-4), Group(0.1, False, 0.0, 0.1, 0.9, decoupled=True)]
    status = torch.zeros(STATUS_SIZE, device="cuda")

    def norm() -> None:
        backend.norm(table, groups, status, scaled=True, carry=False, begin=True, finish=True, eps=1e-12)

    def perturb() -> None:
        backend.perturb(table, groups, status)

    def sgd() -> None:
        backend.sgd(table, groups, status, None)

    def adam() -> None:
        backend.adam(table, groups, status, None)

    def first_step() -> None:
        norm(), perturb()

    def second_step() -> None:
        norm(), sgd()

    passes: dict[str, tuple[Callable[[], None], list[str]]] = {
        "norm": (norm, ["norm"]),
        "perturb": (perturb, ["perturb"]),
        "sgd": (sgd, ["sgd"]),
        "adam": (adam, ["adam"]),
        "first_step": (first_step, ["norm", "perturb"]),
        "second_step": (second_step, ["norm", "sgd"]),
    }
    elements = sum(SHAPES[name])
    rows = []
    for title, (run, parts) in passes.items():
        run()
        seconds = seconds_of(run, flush)
        moved = elements * sum(map(kind.traffic, parts))
        rows.append({
            "shape": name, "elements": elements, "kind": kind.name, "pass": title,
            "bytes": moved, "seconds": seconds, "rate": moved / seconds, "of_copy": moved / seconds / copy_rate,
        })  # fmt: skip
        print(f"{name:14} {kind.name:22} {title:12} {seconds * 1e6:9.1f} us {moved / seconds / 1e9:8.0f} GB/s "
              f"{moved / seconds / copy_rate:6.1%} of copy")  # fmt: skip
    if float(status[SKIP]) != 0:
        raise RuntimeError(
            f"{name}, {kind.name}: a norm was not finite, and updates were copies: the times mean nothing"
        )
    for update in ("sgd", "adam"):
        three = [r for r in rows if r["pass"] in ("first_step", update)]
        moved, seconds = (sum(r[key] for r in three) for key in ("bytes", "seconds"))
        rows.append({**three[0], "pass": f"{update} step in 3 launches", "bytes": moved, "seconds": seconds,
                     "rate": moved / seconds, "of_copy": moved / seconds / copy_rate})  # fmt: skip
        print(
            f"{name:14} {kind.name:22} {update} step in 3 launches: {moved / elements:.0f} B an element, "
            f"{moved / seconds / copy_rate:.1%} of copy"
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for part in ("norm", "perturb", "sgd", "adam"):
            mine = [r for r in rows if r["pass"] == part and r["kind"] == kind]
            axes.plot([r["elements"] for r in mine], [100 * r["of_copy"] for r in mine], "o-", label=f"{part}, {kind}")
    axes.set(xscale="log", xlabel="elements", ylabel="% of the copy rate", title=title)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    source, target = (torch.empty(1 << 27, device="cuda") for _ in range(2))
    copy_rate = 2 * source.numel() * 4 / seconds_of(lambda: target.copy_(source), flush)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; device-to-device copy of 512 MB: {copy_rate / 1e9:.0f} GB/s")
    source = target = flush[:0]  # free
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "copy_rate": copy_rate, "rounds": ROUNDS}
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for kind in KINDS:
            if shape in kind.shapes:
                rows += measure(shape, kind, flush, copy_rate)
                report["rows"] = rows
                (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
                torch.cuda.empty_cache()
    try:
        plot(rows, f"{name}: bytes moved, of copy_'s rate", folder / "kernels.png")
    except ImportError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
