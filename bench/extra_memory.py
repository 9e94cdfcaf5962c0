"""The memory that SAM keeps beyond its base optimizer in the same precision, in bytes per parameter on every process.

Both optimizers are built over existing weights and gradients and step twice. The allocator's own record gives the bytes
that each leaves behind, and SAM's part is the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from bench import spread
from bench.clock import quiet
from bench.memory import allocations
from bench.processes import together
from bench.rounds import Progress, no_progress
from bench.shapes import by_name, numel
from bench.work import example
from fused_sam import SAM

CPU = torch.device("cpu")
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 1e-3}),
}


@dataclass(frozen=True)
class Mode:
    """A way to train. On each process SAM may keep `expected` bytes per parameter of the whole network."""

    name: str
    expected: float
    base: str = "SGD"
    precision: str = "fp32"  # or "masters" or "stochastic", with bf16 weights
    way: str = "plain"
    processes: int = 1


MODES = (
    Mode("fp32", 4),
    Mode("fp32, AdamW", 4, base="AdamW"),
    Mode("bf16 with fp32 masters", 0, precision="masters"),
    Mode("bf16 with fp32 masters, AdamW", 0, base="AdamW", precision="masters"),
    Mode("bf16, stochastic rounding", 2, precision="stochastic"),
    Mode("DDP, 2 processes", 4, way="DDP", processes=2),
    Mode("FSDP2, 2 processes", 2, way="FSDP2", processes=2),
    Mode("DDP, 4 processes", 4, way="DDP", processes=4),
    Mode("FSDP2, 4 processes", 1, way="FSDP2", processes=4),
    Mode("FSDP2, 4 processes, AdamW", 1, base="AdamW", way="FSDP2", processes=4),
)


@dataclass(frozen=True)
class Extra:
    """Bytes per parameter of the whole network, one number per process."""

    mode: Mode
    shape: str
    plain: list[float]  # kept by the base optimizer, without weights and gradients
    sam: list[float]  # kept by SAM

    @property
    def extra(self) -> list[float]:
        return [sam - plain for sam, plain in zip(self.sam, self.plain, strict=True)]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "extra": self.extra}


class PlainMixed:
    """The base optimizer over fp32 masters of bf16 weights, as is usual, or over fp32 copies that last for one step.

    Without masters the state is fp32 too, and the weights are rounded back to bf16, which keeps nothing.
    """

    def __init__(self, params: list[Parameter], base: str, masters: bool) -> None:
        cls, options = BASES[base]
        self.params, self.masters = params, masters
        self.copies = [param.detach().float().requires_grad_() for param in params]
        self.optimizer = cls(self.copies, **options)

    @torch.no_grad()
    def step(self) -> None:
        for param, copy in zip(self.params, self.copies, strict=True):
            if not self.masters:
                copy.data = param.detach().float()
            copy.grad = None if param.grad is None else param.grad.float()
        self.optimizer.step()
        for param, copy in zip(self.params, self.copies, strict=True):
            param.copy_(copy)
            copy.grad = None
            if not self.masters:
                copy.data = torch.empty(0)


def measure(modes: Sequence[Mode], shape: str) -> list[Extra]:
    """Run both optimizers of every mode; all modes take the same number of processes."""
    (world,) = {mode.processes for mode in modes}
    by_process = together(world, on_process, modes, shape) if world > 1 else [on_process(0, 1, modes, shape)]
    count = numel(by_name(shape))
    found = []
    for mode, kept_by in zip(modes, zip(*by_process, strict=True), strict=True):
        plain, sam = ([bytes_ / count for bytes_ in column] for column in zip(*kept_by, strict=True))
        found.append(Extra(mode, shape, plain, sam))
    return found


def measure_all(shape: str, processes: int, progress: Progress = no_progress) -> list[Extra]:
    """Measure every mode that needs at most this many processes."""
    worlds = sorted({mode.processes for mode in MODES if mode.processes <= processes})
    found = []
    for done, world in enumerate(worlds):
        found += measure([mode for mode in MODES if mode.processes == world], shape)
        progress((done + 1) / len(worlds))
    return found


def on_process(rank: int, world: int, modes: Sequence[Mode], shape: str) -> list[tuple[int, int]]:
    """Return for every mode the bytes that the base optimizer and SAM leave behind."""
    return [(bytes_kept(mode, shape, sam=False), bytes_kept(mode, shape, sam=True)) for mode in modes]


def bytes_kept(mode: Mode, shape: str, sam: bool) -> int:
    """Return the bytes that one of the two optimizers leaves behind on this process."""
    if mode.way == "plain":
        params = example(by_name(shape), CPU)
        if mode.precision != "fp32":
            params = [as_bf16(param) for param in params]
        return left_behind(mode, params, sam)
    model = spread.trained(by_name(shape), mode.way)
    found = left_behind(mode, list(model.parameters()), sam)
    distributed.barrier()  # no process ends while another still needs it
    return found


def as_bf16(param: Parameter) -> Parameter:
    low = Parameter(param.detach().bfloat16())
    assert param.grad is not None
    low.grad = param.grad.bfloat16()
    return low


def left_behind(mode: Mode, params: list[Parameter], sam: bool) -> int:
    """Return the bytes that stay allocated after an optimizer was built and has stepped twice."""
    alive: list[object] = []

    def build_and_step() -> None:
        optimizer = sam_of(mode, params) if sam else plain_of(mode, params)
        for _ in range(2):
            for half in halves(optimizer):
                half()
        alive.append(optimizer)

    with quiet():
        return sum(allocations(build_and_step, CPU))


def sam_of(mode: Mode, params: list[Parameter]) -> Any:
    cls, options = BASES[mode.base]
    how: dict[str, Any] = {"masters": {"master_weights": True}, "stochastic": {"stochastic_rounding": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SAM(params, cls, rho=0.05, **how.get(mode.precision, {}), **options)


def plain_of(mode: Mode, params: list[Parameter]) -> Any:
    if mode.precision != "fp32":
        return PlainMixed(params, mode.base, masters=mode.precision == "masters")
    cls, options = BASES[mode.base]
    return cls(params, **options)


def halves(optimizer: Any) -> list[Callable[[], object]]:
    return [optimizer.first_step, optimizer.second_step] if hasattr(optimizer, "first_step") else [optimizer.step]
