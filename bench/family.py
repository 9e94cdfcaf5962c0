"""The methods that are compared: how each is built, stepped and tried, and what it should cost.

All methods of fused_sam.METHODS are here, except for NOT_COMPARED. A new one needs no entry: it runs with its default
options and three values of rho. OWN adds what the class does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

import fused_sam
from bench.errors import BenchError
from fused_sam import SAM
from fused_sam.methods.displaced import DisplacedSAM
from fused_sam.schedule import Every, LastSteps
from fused_sam.training import sam_step

MOMENTUM = 0.9
MICROBATCHES = 2
RHO = 0.2  # the middle value that is tried, if a class has no default of its own
Build = Callable[..., Optimizer]  # takes parameters, total steps, and options

# Bytes per fp32 parameter with SGD-momentum. An update without undo reads w, g and m and writes w and m; the finite
# check before it reads g.
PLAIN_UPDATE, WHOLE_STEP = 24.0, 44.0


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        grid: the method's own options, from which a validation split chooses after the learning rate.
        bytes: the least that the optimizer moves per step and parameter, fp32 with SGD-momentum, averaged over `period`
            steps; None if it is not known.
        target: the time of a training step over SGD's that the method should reach.
        passes: forward and backward passes per step, for estimates.
        stretch: the factor on the other methods' epochs.
        accuracy: True if its accuracy is measured by default.
    """

    label: str
    build: Build
    grid: tuple[dict[str, float], ...]
    bytes: float | None = None
    period: int = 1
    target: float | None = None
    passes: float = 2.0
    stretch: int = 1
    accuracy: bool = True


@dataclass(frozen=True)
class Own:
    """What a benchmark sets for a class of fused_sam.METHODS.

    Attributes:
        key: the name on the command line and in JSON files; empty: the class's name in lower case.
        options: the class's options that are not its defaults.
        facts: fields of Method that are not their defaults.
    """

    key: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def sgd(params: Iterable[Tensor], total: int, *, lr: float) -> Optimizer:
    return SGD(params, lr, MOMENTUM, fused=True)


def of(cls: type[SAM], **fixed: Any) -> Build:
    """Return how a method of this package is built over SGD with momentum."""

    def build(params: Iterable[Tensor], total: int, **options: float) -> Optimizer:
        return cls(params, SGD, momentum=MOMENTUM, **{**fixed, **options})

    return build


def on_adam(params: Iterable[Tensor], total: int, *, lr: float, rho: float = 0.05) -> Optimizer:
    """Build PrecondSAM, which needs Adam's second moment, at a learning rate that suits Adam."""
    return fused_sam.PrecondSAM(params, AdamW, rho=rho, lr=lr / 20)


def tail(params: Iterable[Tensor], total: int, **options: float) -> Optimizer:
    return of(SAM, schedule=LastSteps(0.7, total))(params, total, **options)


def le_sam(params: Iterable[Tensor], total: int, **options: float) -> Optimizer:
    return of(fused_sam.LESAM, total=total)(params, total, **options)


def rhos(*values: float) -> tuple[dict[str, float], ...]:
    """Return a grid of rho alone."""
    return tuple({"rho": value} for value in values)


def pairs(name: str, values: tuple[float, ...], rho: float = RHO) -> tuple[dict[str, float], ...]:
    """Return a grid of one option, at a rho that suits the method."""
    return tuple({"rho": rho, name: value} for value in values)


RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # learning rates from which every method chooses

# FlatLoRA trains adapters of frozen weights, which the networks here do not have.
NOT_COMPARED = ("FlatLoRA",)

ESAM_OPTIONS = {"beta": 0.6, "gamma": 0.6}
OWN: dict[str, Own] = {
    "SAM": Own(facts={"bytes": WHOLE_STEP, "target": 2.05}),
    # Its norm reads the weights and the gradients.
    "ASAM": Own(facts={"grid": rhos(0.5, 1.0, 2.0), "bytes": WHOLE_STEP + 4}),
    "ESAM": Own(options=ESAM_OPTIONS, facts={"label": "ESAM(0.6, 0.6)", "bytes": WHOLE_STEP, "target": 1.4}),
    "FriendlySAM": Own("friendly", facts={"grid": pairs("lmbda", (0.6, 0.9, 0.95)), "bytes": 68}),
    "GCSAM": Own(facts={"bytes": 56}),
    "GSAM": Own(facts={"grid": pairs("alpha", (0.2, 0.4, 0.7)), "bytes": 64}),
    "LookSAM": Own(
        options={"k": 5},
        facts={
            "label": "LookSAM(5)", "grid": pairs("alpha", (0.1, 0.3, 0.7)), "bytes": (64 + 4 * 44) / 5, "period": 5,
            "target": 1.25, "passes": 1.2,
        },
    ),
    # Their norms per tensor read the weights and the gradients.
    "LayerSAM": Own(facts={"grid": rhos(0.01, 0.02, 0.05), "bytes": WHOLE_STEP + 4}),
    "LookLayerSAM": Own(
        options={"k": 5},
        facts={
            "label": "LookLayerSAM(5)", "grid": rhos(0.01, 0.02, 0.05), "bytes": (68 + 4 * 44) / 5, "period": 5,
            "target": 1.25, "passes": 1.2,
        },
    ),
    # Over AdamW: the norm and the perturbation read its second moment.
    "PrecondSAM": Own(facts={"build": on_adam, "grid": rhos(0.02, 0.05, 0.1), "bytes": WHOLE_STEP + 16}),
    "MicrobatchSAM": Own(
        "microbatch", {"num_microbatches": MICROBATCHES},
        {"label": f"MicrobatchSAM({MICROBATCHES})", "bytes": 20 * MICROBATCHES + 8 * (MICROBATCHES - 1) + 24},
    ),
    "MomentumSAM": Own(
        "momentum", facts={"grid": rhos(0.3, 1.0, 3.0), "bytes": WHOLE_STEP, "target": 1.05, "passes": 1}
    ),
    "AsyncSAM": Own("async", facts={"bytes": WHOLE_STEP + 8, "target": 1.05, "passes": 1}),
    "RandomSAM": Own("random", facts={"passes": 1}),
    # The length of its perturbation comes from sigma; rho says only whether there is one.
    "LESAM": Own(
        facts={"build": le_sam, "grid": pairs("sigma", (0.1, 0.35, 1.0)), "bytes": WHOLE_STEP, "target": 2.05}
    ),
    "StableSAM": Own("stable", facts={"bytes": WHOLE_STEP + 20}),
    # rho is per gradient: SAM's values would be far too short here.
    "UnnormalisedSAM": Own("unnormalised", facts={"grid": rhos(0.1, 0.5, 2.0), "bytes": WHOLE_STEP, "target": 2.05}),
    "WSAM": Own(facts={"grid": pairs("gamma", (0.8, 0.9, 0.95)), "bytes": 76}),
}  # fmt: skip


def entries(classes: Mapping[str, type[SAM]]) -> dict[str, Method]:
    """Return an entry for each class, by key."""
    found = {}
    for name, cls in classes.items():
        if name in NOT_COMPARED:
            continue
        own = OWN.get(name, Own())
        rho = cls.DEFAULTS.get("rho", RHO)
        usual = {"label": name, "build": of(cls, **own.options), "grid": rhos(rho / 2, rho, 2 * rho)}
        found[own.key or name.lower()] = Method(**{**usual, **own.facts})
    return found


METHODS: dict[str, Method] = {
    "sgd": Method("SGD", sgd, ({},), bytes=20, passes=1),
    "sgd-2x": Method("SGD, 2x epochs", sgd, ({},), passes=1, stretch=2),
    **entries(fused_sam.METHODS),
    # The same method with another mask, whose accuracy is not measured again.
    "esam-tensors": Method(
        "ESAM(0.6, 0.6), whole tensors", of(fused_sam.ESAM, mask="tensors", **ESAM_OPTIONS), rhos(0.1, 0.2, 0.4),
        target=1.4, accuracy=False,
    ),
    "interval": Method(
        "SAM, every 10th step", of(SAM, schedule=Every(10)), rhos(0.2, 0.4, 0.8),
        bytes=(WHOLE_STEP + 9 * PLAIN_UPDATE) / 10, period=10, target=1.12, passes=1.1,
    ),
    "tail": Method(
        "SAM, last 30%", tail, rhos(0.1, 0.2, 0.4), bytes=0.3 * WHOLE_STEP + 0.7 * PLAIN_UPDATE, period=10, target=1.32,
        passes=1.3,
    ),
}  # fmt: skip


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Take one training step on a batch, and return the loss at the weights, detached."""
    if getattr(optimizer, "selected_fraction", None) is not None:
        assert isinstance(optimizer, SAM)
        return sam_step(model, sample_losses, (x, y), optimizer).loss
    if isinstance(optimizer, fused_sam.MicrobatchSAM):
        return optimizer.step(partial(part_loss, model, x.chunk(MICROBATCHES), y.chunk(MICROBATCHES)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    loss: Any = optimizer.step(closure)  # type: ignore[arg-type]  # torch's stubs want a float; any type is passed on
    return loss


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the losses [B], because data selection compares them sample by sample."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def part_loss(model: nn.Module, xs: tuple[Tensor, ...], ys: tuple[Tensor, ...], i: int) -> Tensor:
    loss = cross_entropy(model(xs[i]), ys[i])
    loss.backward()
    return loss.detach()


def rewind(optimizer: Optimizer) -> None:
    """Let a schedule over the whole of training start again."""
    for group in optimizer.param_groups:
        if "sam_step" in group:
            group["sam_step"] = 0


def restore_clean_weights(optimizer: Optimizer) -> None:
    """Restore the clean weights for evaluating: those of one-pass methods are displaced between steps."""
    if isinstance(optimizer, DisplacedSAM):
        optimizer.eval()


def chosen(names: Iterable[str]) -> list[str]:
    """Return the names, each once and in the table's order; all methods if there are no names.

    Raises:
        BenchError: a name is unknown.
    """
    wanted = list(names) or list(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise BenchError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return [name for name in METHODS if name in wanted]
