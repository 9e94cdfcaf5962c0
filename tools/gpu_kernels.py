"""Times each CUDA kernel of a SAM step on this machine's GPU, and torch's device-to-device copy in the same run.

    python tools/gpu_kernels.py --out DIR        writes DIR/kernels.json; with matplotlib also DIR/kernels.png

The caches are cold when a pass of the step begins, as they are after a backward pass. docs/gpu.md has the predictions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends import choose
from fused_sam.backends.contract import (
    RULES,
    AdamGroup,
    LionGroup,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    UpdateRule,
)

ROUNDS = 20
CUDA = torch.device("cuda")
UPDATES = {rule.name: rule for rule in RULES}
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
    """The dtypes of a table, and the bytes per element that each primitive then moves."""

    name: str
    param: torch.dtype
    grad: torch.dtype
    masters: bool = False
    stochastic: bool = False
    shapes: tuple[str, ...] = tuple(SHAPES)

    def traffic(self, primitive: str) -> int:
        p, g = self.param.itemsize, self.grad.itemsize
        clean = 4 if self.masters else p  # the master or the backup
        written = 4 if self.masters else 0  # the master of an update
        return {
            "norm": g,
            "perturb": clean + g + p + (0 if self.masters else p),
            "sgd": clean + g + p + written + 2 * 4,
            "lion": clean + g + p + written + 2 * 4,
            "adam": clean + g + p + written + 4 * 4,
        }[primitive]


F32, BF16 = torch.float32, torch.bfloat16
LARGE = ("25.6M in 161", "134M in 128")
KINDS = [
    Kind("fp32", F32, F32),
    Kind("bf16", BF16, BF16),
    Kind("bf16, stochastic", BF16, BF16, stochastic=True, shapes=LARGE),
    Kind("bf16 with fp32 masters", BF16, BF16, masters=True, shapes=LARGE),
]


def seconds_of(run: Callable[[], Any], flush: Tensor) -> float:
    """Return the median time on the stream with cold caches.

    Writing `flush` takes longer than the host needs to launch, so that no launch is waited for.
    """
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


def tables_of(sizes: list[int], kind: Kind) -> dict[str, Table]:
    """Return a table per update rule; all of them share their tensors."""

    def column(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n, device="cuda").to(dtype) for n in sizes]

    params, clean = column(kind.param), column(F32 if kind.masters else kind.param)
    grads, exp_avg, exp_avg_sq = column(kind.grad), column(F32), column(F32)
    for v in exp_avg_sq:
        v.square_()
    buffers: dict[str, list[Tensor | None]] = {
        "momentum_buffer": [*exp_avg],
        "exp_avg": [*exp_avg],
        "exp_avg_sq": [*exp_avg_sq],
        "max_exp_avg_sq": [None] * len(sizes),
        "step": [torch.zeros((), device="cuda") for _ in sizes],
    }

    def table(rule: UpdateRule) -> Table:
        return Table(
            params,
            [i % 2 for i in range(len(sizes))],
            kind.grad,
            backups=[] if kind.masters else clean,
            masters=clean if kind.masters else [],
            rule=rule,
            state={column.name: buffers[column.name] for column in rule.columns},
            stochastic_rounding=kind.stochastic,
            rng_streams=list(range(len(sizes))),
            grads=grads,
            grad_addresses=array("q", [g.data_ptr() for g in grads]),
        )

    return {name: table(rule) for name, rule in UPDATES.items()}


def measure(name: str, kind: Kind, flush: Tensor, copy_rate: float) -> list[dict[str, Any]]:
    """Time every pass over tensors of one shape and kind, and return a row for each."""
    backend, status = choose("cuda", CUDA), Status(CUDA)
    tables = tables_of(SHAPES[name], kind)
    perturb_groups = [PerturbGroup(0.05), PerturbGroup(0.1)]

    def norm() -> None:
        backend.norm([tables["sgd"]], perturb_groups, status, keep_skip=False, eps=1e-12)

    def perturb() -> None:
        backend.perturb(tables["sgd"], perturb_groups, status)

    def sgd() -> None:
        groups = [SGDGroup(0.1, 0.9, weight_decay=1e-4), SGDGroup(0.1, 0.9)]
        backend.update(tables["sgd"], groups, status, None, math.inf)

    def adam() -> None:
        groups = [AdamGroup(0.1, weight_decay=1e-4), AdamGroup(0.1, decoupled_weight_decay=True)]
        backend.update(tables["adam"], groups, status, None, math.inf)

    def lion() -> None:
        backend.update(tables["lion"], [LionGroup(0.1, weight_decay=1e-4), LionGroup(0.1)], status, None, math.inf)

    def first_step() -> None:
        norm(), perturb()

    def second_step() -> None:
        norm(), sgd()

    passes: dict[str, tuple[Callable[[], None], list[str]]] = {
        "norm": (norm, ["norm"]),
        "perturb": (perturb, ["perturb"]),
        "sgd": (sgd, ["sgd"]),
        "adam": (adam, ["adam"]),
        "lion": (lion, ["lion"]),
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
    if float(status.skip) != 0:
        raise RuntimeError(
            f"{name}, {kind.name}: a norm was not finite, and updates were copies: the times mean nothing"
        )
    for update in UPDATES:
        three = [r for r in rows if r["pass"] in ("first_step", update)]
        moved, seconds = (sum(r[key] for r in three) for key in ("bytes", "seconds"))
        rows.append({**three[0], "pass": f"{update} step in 3 launches", "bytes": moved, "seconds": seconds,
                     "rate": moved / seconds, "of_copy": moved / seconds / copy_rate})  # fmt: skip
        print(
            f"{name:14} {kind.name:22} {update} step in 3 launches: {moved / elements:.0f} B per element, "
            f"{moved / seconds / copy_rate:.1%} of copy"
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for primitive in ("norm", "perturb", *UPDATES):
            mine = [r for r in rows if r["pass"] == primitive and r["kind"] == kind]
            fractions = [100 * r["of_copy"] for r in mine]
            axes.plot([r["elements"] for r in mine], fractions, "o-", label=f"{primitive}, {kind}")
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
    source = target = flush[:0]  # frees their memory
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
