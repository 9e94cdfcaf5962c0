"""The methods of the SAM family that are compared: how each is built, stepped, and tried, and what it should cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

import fused_sam
from bench.errors import BenchError
from fused_sam.schedule import Every, LastSteps
from fused_sam.training import sam_step

MOMENTUM = 0.9
MICROBATCHES = 2
Build = Callable[..., Optimizer]  # of parameters, total steps, and options

# Bytes a parameter in fp32 with SGD-momentum. An update without undo reads w, g and m and writes w and m; before it the
# finite check reads g.
PLAIN_UPDATE, WHOLE_STEP = 24.0, 44.0


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    `bytes` is what the optimizer moves a step and parameter at least, fp32 with SGD-momentum, averaged over `period`
    steps; `target` the time of a training step over SGD's that it is to reach; `grid` the method's own options, which a
    validation split chooses from after the learning rate.
    """

    label: str
    build: Build
    grid: tuple[dict[str, float], ...]
    bytes: float | None = None
    period: int = 1
    target: float | None = None
    passes: float = 2.0  # forward and backward passes a step, for estimates
    stretch: int = 1  # times the epochs of the others
    accuracy: bool = True  # whether its accuracy is measured unasked


def sgd(params: Iterable[Tensor], total: int, *, lr: float) -> Optimizer:
    return SGD(params, lr, MOMENTUM, fused=True)


def of(cls: type[fused_sam.SAM], **fixed: Any) -> Build:
    """A method of this package over SGD with momentum."""

    def build(params: Iterable[Tensor], total: int, **options: float) -> Optimizer:
        return cls(params, SGD, momentum=MOMENTUM, **{**fixed, **options})

    return build


def tail(params: Iterable[Tensor], total: int, **options: float) -> Optimizer:
    return of(fused_sam.SAM, schedule=LastSteps(0.7, total))(params, total, **options)


def rhos(*values: float) -> tuple[dict[str, float], ...]:
    return tuple({"rho": value} for value in values)


def pairs(name: str, values: tuple[float, ...], rho: float) -> tuple[dict[str, float], ...]:
    """One option varied, at a rho that suits the method."""
    return tuple({"rho": rho, name: value} for value in values)


RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # learning rates that every method chooses from

METHODS: dict[str, Method] = {
    "sgd": Method("SGD", sgd, ({},), bytes=20, passes=1),
    "sgd-2x": Method("SGD, 2x epochs", sgd, ({},), passes=1, stretch=2),
    "sam": Method("SAM", of(fused_sam.SAM), rhos(0.1, 0.2, 0.4), bytes=WHOLE_STEP, target=2.05),
    # its norm reads the weights beside the gradients
    "asam": Method("ASAM", of(fused_sam.ASAM), rhos(0.5, 1.0, 2.0), bytes=WHOLE_STEP + 4),
    "microbatch": Method(
        f"MicrobatchSAM({MICROBATCHES})", of(fused_sam.MicrobatchSAM, num_microbatches=MICROBATCHES),
        rhos(0.1, 0.2, 0.4), bytes=20 * MICROBATCHES + 8 * (MICROBATCHES - 1) + 24,
    ),
    "esam": Method(
        "ESAM(0.6, 0.6)", of(fused_sam.ESAM, beta=0.6, gamma=0.6), rhos(0.1, 0.2, 0.4), bytes=WHOLE_STEP, target=1.4
    ),
    "esam-tensors": Method(
        "ESAM(0.6, 0.6), whole tensors", of(fused_sam.ESAM, beta=0.6, gamma=0.6, mask="tensors"), rhos(0.1, 0.2, 0.4),
        target=1.4, accuracy=False,  # the same method with another mask
    ),
    "looksam": Method(
        "LookSAM(5)", of(fused_sam.LookSAM, k=5), pairs("alpha", (0.1, 0.3, 0.7), 0.2), bytes=(64 + 4 * 44) / 5,
        period=5, target=1.25, passes=1.2,
    ),
    "gsam": Method("GSAM", of(fused_sam.GSAM), pairs("alpha", (0.2, 0.4, 0.7), 0.2), bytes=64),
    "friendly": Method("FriendlySAM", of(fused_sam.FriendlySAM), pairs("lmbda", (0.6, 0.9, 0.95), 0.2), bytes=68),
    "gcsam": Method("GCSAM", of(fused_sam.GCSAM), rhos(0.1, 0.2, 0.4), bytes=56),
    "momentum": Method(
        "MomentumSAM", of(fused_sam.MomentumSAM), rhos(0.3, 1.0, 3.0), bytes=WHOLE_STEP, target=1.05, passes=1
    ),
    "wsam": Method("WSAM", of(fused_sam.WSAM), pairs("gamma", (0.8, 0.9, 0.95), 0.2), bytes=76),
    "interval": Method(
        "SAM, every 10th step", of(fused_sam.SAM, schedule=Every(10)), rhos(0.2, 0.4, 0.8),
        bytes=(WHOLE_STEP + 9 * PLAIN_UPDATE) / 10, period=10, target=1.12, passes=1.1,
    ),
    "tail": Method(
        "SAM, last 30%", tail, rhos(0.1, 0.2, 0.4), bytes=0.3 * WHOLE_STEP + 0.7 * PLAIN_UPDATE, period=10, target=1.32,
        passes=1.3,
    ),
}  # fmt: skip


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step on a batch; the loss at the weights, detached."""
    if getattr(optimizer, "selects", None) is not None:
        assert isinstance(optimizer, fused_sam.SAM)
        return sam_step(model, sample_losses, (x, y), optimizer).loss
    if isinstance(optimizer, fused_sam.MicrobatchSAM):
        return optimizer.step(partial(part_loss, model, x.chunk(MICROBATCHES), y.chunk(MICROBATCHES)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    loss: Any = optimizer.step(closure)  # type: ignore[arg-type]  # torch's stubs want a float; it hands on what it gets
    return loss


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """[B]: data selection compares them one by one."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def part_loss(model: nn.Module, xs: tuple[Tensor, ...], ys: tuple[Tensor, ...], i: int) -> Tensor:
    loss = cross_entropy(model(xs[i]), ys[i])
    loss.backward()
    return loss.detach()


def rewind(optimizer: Optimizer) -> None:
    """Let a schedule over the whole of training begin again."""
    for group in optimizer.param_groups:
        if "updates" in group:
            group["sam_step"] = 0


def at_rest(optimizer: Optimizer) -> None:
    """The clean weights, for evaluating: Momentum-SAM's are displaced between steps."""
    if isinstance(optimizer, fused_sam.MomentumSAM):
        optimizer.eval()


def chosen(names: Iterable[str]) -> list[str]:
    """The names, each once, in the table's order; all of them where none is named.

    Raises:
        BenchError: a name is unknown.
    """
    wanted = list(names) or list(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise BenchError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return [name for name in METHODS if name in wanted]
