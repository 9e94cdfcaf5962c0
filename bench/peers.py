"""The implementations of a SAM step that are compared, by name: how each is built and where it runs."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from bench.errors import BenchError
from bench.hyper import Hyper
from bench.stock import Compiled, Foreach, InPlace, PerTensor


class Peer(Protocol):
    """An implementation that takes `.grad` of its parameters as the first gradient, then as the second."""

    def first_step(self) -> object: ...

    def second_step(self) -> object: ...


def pytorch_optimizer_sam(params: list[Parameter], hyper: Hyper) -> Peer:
    """Return the `pytorch-optimizer` package's SAM, as a user gets it."""
    sam = importlib.import_module("pytorch_optimizer").SAM
    return sam(params, hyper.base, rho=hyper.rho, perturb_eps=hyper.eps, **hyper.options())


def fused_sam(params: list[Parameter], hyper: Hyper, backend: str) -> Peer:
    """Return this package's SAM."""
    sam = importlib.import_module("fused_sam").SAM
    with warnings.catch_warnings():  # bf16 weights are timed here, not trained
        warnings.simplefilter("ignore", UserWarning)
        # With AdamW, `eps` would set AdamW's own; SAM's is hyper.eps by default.
        return sam(params, hyper.base, rho=hyper.rho, backend=backend, **hyper.options())


@dataclass(frozen=True)
class Entry:
    """A peer's label in tables and plots, how to build it, and the devices where it runs by default."""

    pattern: str
    build: Callable[[list[Parameter], Hyper], Peer]
    default_on: tuple[str, ...] = ()
    ours: bool = False

    def label(self, base: type[Optimizer] = SGD) -> str:
        return self.pattern.format(base=base.__name__)


PEERS: dict[str, Entry] = {
    "per-tensor": Entry("per-tensor SAM + {base}", PerTensor, ("cpu", "cuda")),
    "pytorch-optimizer": Entry("pytorch-optimizer SAM", pytorch_optimizer_sam, ("cpu", "cuda")),
    "foreach": Entry("foreach SAM + {base}(foreach)", partial(Foreach, foreach=True), ("cpu", "cuda")),
    "foreach-fused": Entry("foreach SAM + {base}(fused)", partial(Foreach, fused=True), ("cpu", "cuda")),
    "in-place": Entry("foreach in place + {base}(fused)", InPlace, ("cpu", "cuda")),
    # on no device by default, because compiling takes minutes
    "compiled": Entry("foreach in place, compiled", Compiled),
    "ours-cpu": Entry("fused_sam (cpu)", partial(fused_sam, backend="cpu"), ("cpu",), ours=True),
    "ours-cuda": Entry("fused_sam (cuda)", partial(fused_sam, backend="cuda"), ("cuda",), ours=True),
    "ours-triton": Entry("fused_sam (triton)", partial(fused_sam, backend="triton"), ("cuda",), ours=True),
    "ours-foreach": Entry("fused_sam (foreach)", partial(fused_sam, backend="foreach"), ours=True),
    "ours-reference": Entry("fused_sam (reference)", partial(fused_sam, backend="reference"), ours=True),
}


# On a CPU torch's fused SGD (2.13) does not move bf16 weights, except for the last few of a tensor.
WRONG_IN_BF16 = ("foreach-fused", "in-place")


def choose(device: torch.device, names: Sequence[str], compiled: bool = False) -> tuple[list[str], list[str]]:
    """Return the peers to run, and notes on those left out.

    The peers are those named, or else the device's usual ones that can run. `compiled` adds the multi-tensor code under
    torch.compile.

    Raises:
        BenchError: a named peer is unknown, or none is left.
    """
    for name in names:
        if name not in PEERS:
            raise BenchError(f"unknown peer {name!r}: choose from {', '.join(PEERS)}")
    usual = [name for name, peer in PEERS.items() if device.type in peer.default_on]
    problems = {name: problem(name, device) for name in ([] if names else usual)}
    chosen = list(dict.fromkeys([*names, *(name for name in problems if not problems[name])]))
    if compiled and "compiled" not in chosen:
        chosen.insert(0, "compiled")
    if not any(PEERS[name].ours for name in chosen) and not names:
        ours = next(name for name in usual if PEERS[name].ours)
        raise BenchError(f"{PEERS[ours].label()} cannot run on {device}: {problems[ours]}")
    return chosen, [f"left out {PEERS[name].label()}: {reason}" for name, reason in problems.items() if reason]


def problem(name: str, device: torch.device) -> str:
    """Return one line that says why a peer cannot run on the device; empty if it can."""
    param = Parameter(torch.zeros(1, device=device))
    try:
        PEERS[name].build([param], Hyper())
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""


def baseline(names: list[str]) -> str:
    """Return the peer that ratios are taken to: the first of ours, or the last named one if none is ours."""
    return next((name for name in names if PEERS[name].ours), names[-1])
