"""Tables, kinds, shapes and timing that the tools for a machine with a GPU share."""

from __future__ import annotations

import argparse
import math
import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from bench.machine import commit
from fused_sam.backends.contract import (
    RULES,
    AdamGroup,
    Backend,
    PerturbGroup,
    SGDGroup,
    Status,
    Table,
    UpdateRule,
)

ROUNDS = 20
CUDA = torch.device("cuda")
UPDATES = {rule.name: rule for rule in RULES}
PERTURB_GROUPS = [PerturbGroup(0.05), PerturbGroup(0.1)]
UPDATE_GROUPS: dict[str, list[Any]] = {
    **{rule.name: [rule.group(0.1, weight_decay=1e-4), rule.group(0.1)] for rule in RULES},
    "sgd": [SGDGroup(0.1, 0.9, weight_decay=1e-4), SGDGroup(0.1, 0.9)],
    "adam": [AdamGroup(0.1, weight_decay=1e-4), AdamGroup(0.1, decoupled_weight_decay=True)],
}
SHAPES = {
    "1000 x 256": [256] * 1000,
    # ResNet-18: norms' vectors, four stages of 3 x 3 convolutions, three shortcuts, the first and the last layer.
    "11.7M in 62": [64] * 10 + [128] * 10 + [256] * 10 + [512] * 10 + [36864] * 4 + [73728] + [147456] * 3 + [294912]
    + [589824] * 3 + [1179648] + [2359296] * 3 + [8192, 32768, 131072, 9408, 512000, 1000],
    "25.6M in 161": [159_000] * 160 + [117_000],
    "134M in 128": [1 << 20] * 128,
    "537M in 128": [1 << 22] * 128,
}  # fmt: skip
MANY, LARGE = "25.6M in 161", "134M in 128"


@dataclass(frozen=True)
class Kind:
    """The dtypes of a table, and the bytes per element that each primitive then moves."""

    name: str
    param: torch.dtype
    grad: torch.dtype
    masters: bool = False
    stochastic: bool = False
    misaligned: bool = False  # True if gradients begin one element behind a multiple of 16 bytes
    masked: bool = False  # True if perturb moves half of the elements
    shapes: tuple[str, ...] = tuple(SHAPES)

    def traffic(self, primitive: str) -> int:
        p, g = self.param.itemsize, self.grad.itemsize
        clean = 4 if self.masters else p  # the master or the backup
        written = 4 if self.masters else 0  # the master of an update
        return {
            "norm": g,
            "perturb": clean + g + p + (0 if self.masters else p),
            **{rule.name: clean + g + p + written + 2 * 4 * len(rule.buffers()) for rule in RULES},
            "adam": clean + g + p + written + 4 * 4,  # without amsgrad
        }[primitive]

    def perturb_groups(self) -> list[PerturbGroup]:
        return [group._replace(mask_prob=0.5) if self.masked else group for group in PERTURB_GROUPS]


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOTH = (MANY, LARGE)
KINDS = [
    Kind("fp32", F32, F32),
    Kind("bf16", BF16, BF16),
    Kind("fp16", F16, F16, shapes=BOTH),
    Kind("fp32, misaligned grads", F32, F32, misaligned=True, shapes=BOTH),
    Kind("bf16, misaligned grads", BF16, BF16, misaligned=True, shapes=BOTH),
    Kind("bf16, stochastic", BF16, BF16, stochastic=True, shapes=BOTH),
    Kind("bf16, stochastic, masked", BF16, BF16, stochastic=True, masked=True, shapes=BOTH),
    Kind("bf16 with fp32 masters", BF16, BF16, masters=True, shapes=BOTH),
]


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """End the program with one line if torch finds no GPU."""
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")


def head() -> dict[str, Any]:
    """Return what every result begins with: device, versions, commit and time."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tables_of(sizes: list[int], kind: Kind, device: torch.device = CUDA) -> dict[str, Table]:
    """Return a table per update rule; all of them share their tensors."""

    def column(dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
        return [torch.randn(n + offset, device=device).to(dtype)[offset:] for n in sizes]

    params, clean = column(kind.param), column(F32 if kind.masters else kind.param)
    grads, exp_avg, exp_avg_sq = column(kind.grad, int(kind.misaligned)), column(F32), column(F32)
    for v in exp_avg_sq:
        v.square_()
    buffers: dict[str, list[Tensor | None]] = {
        "momentum_buffer": [*exp_avg],
        "exp_avg": [*exp_avg],
        "exp_avg_sq": [*exp_avg_sq],
        "max_exp_avg_sq": [None] * len(sizes),
        "step": [torch.zeros((), device=device) for _ in sizes],
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


def passes(backend: Backend, tables: dict[str, Table], kind: Kind, status: Status) -> dict[str, Callable[[], None]]:
    """Return the primitives of a step as functions without arguments."""

    def norm() -> None:
        backend.norm([tables["sgd"]], kind.perturb_groups(), status, keep_skip=False, eps=1e-12)

    def perturb() -> None:
        backend.perturb(tables["sgd"], kind.perturb_groups(), status)

    def updating(name: str) -> Callable[[], None]:
        return lambda: backend.update(tables[name], UPDATE_GROUPS[name], status, None, math.inf)

    return {"norm": norm, "perturb": perturb, **{name: updating(name) for name in UPDATES}}


class Clock:
    """Times launches with cold caches, as they are after a backward pass."""

    def __init__(self) -> None:
        # Reading leaves clean lines in the caches. Lines that are written would go to memory during the timed pass.
        self._cold = torch.zeros(1 << 28, device=CUDA)
        self._one = torch.zeros(1, device=CUDA)
        self.launch = 0.0
        self.launch = self.seconds(lambda: self._one.add_(1))  # of a kernel with nothing to do

    def seconds(self, run: Callable[[], Any], rounds: int = ROUNDS) -> float:
        """Return the median time on the stream, less an empty launch.

        Reading the cold memory takes longer than the host needs to launch, so that no launch is waited for.
        """
        times = []
        for _ in range(rounds):
            self._cold.sum()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return max(statistics.median(times) - self.launch, 1e-7)

    def copy_rate(self) -> float:
        """Return the bytes per second that torch's copy of 512 MB on the device reads and writes."""
        source, target = (torch.zeros(1 << 27, device=CUDA) for _ in range(2))
        return 2 * source.numel() * 4 / self.seconds(lambda: target.copy_(source))
