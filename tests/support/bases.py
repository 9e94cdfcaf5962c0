"""Base optimizers of torch and other packages under SAM, each against itself alone; the table of docs/bases.md.

    python -m tests.support.bases        # writes the rows of the packages that are installed into docs/bases.md
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam import SAM

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
MARKS = ("<!-- the table of tested bases: python -m tests.support.bases -->\n", "<!-- end of the table -->\n")
RHO = 0.05
# Options that are named as SAM's are, which go to the base optimizer through base_options.
SAMS = ("rho", "eta", "eps", "adaptive", "seed", "schedule", "backend", "max_norm")

# Weights are of size 1 to 4, so that one rounding is up to 2.4e-7; ten of them are five steps with an order of
# operations of their own.
ROUNDING = 2.4e-6


@dataclass(frozen=True)
class Base:
    """An optimizer class and options that exercise it.

    Attributes:
        package: the distribution; its name on a package index.
        path: module and class.
        matrices: True if it takes matrices alone.
        fused: True if SAM fuses it, so that roundings differ from the class's own.
    """

    package: str
    path: str
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.01})
    matrices: bool = False
    fused: bool = False

    def __str__(self) -> str:
        return f"{self.package}-{self.name}"

    @property
    def name(self) -> str:
        return self.path.rpartition(":")[2]

    def cls(self) -> Any:
        module, _, name = self.path.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)


def of(package: str, module: str, names: str, **more: Any) -> list[Base]:
    return [Base(package, f"{module}:{name}", **more) for name in names.split()]


TORCH = [
    *of("torch", "torch.optim", "SGD", fused=True, options={"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    *of("torch", "torch.optim", "Adam AdamW", fused=True, options={"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    *of("torch", "torch.optim", "ASGD Adafactor Adagrad Adamax NAdam RAdam RMSprop Rprop"),
    *of("torch", "torch.optim", "Adadelta", options={"lr": 0.1, "rho": 0.8}),
    *of("torch", "torch.optim", "Muon", options={"lr": 0.02}, matrices=True),
]
OURS = [
    *of("fused_sam", "fused_sam", "Lion", fused=True, options={"lr": 0.01, "weight_decay": 0.1}),
    *of("fused_sam", "fused_sam", "MuonWithAdamW", options={"lr": 0.02, "adamw_lr": 0.01}),
]
OTHERS = [
    *of("schedulefree", "schedulefree", "AdamWScheduleFree RAdamScheduleFree SGDScheduleFree"),
    *of("bitsandbytes", "bitsandbytes.optim", "AdamW8bit Adam8bit Lion8bit", options={"lr": 0.01, "min_8bit_size": 9}),
    *of("lion-pytorch", "lion_pytorch", "Lion"),
    *of("torch-optimi", "optimi", "Adam AdamW Adan Lion RAdam Ranger SGD"),
    *of("torch-optimi", "optimi", "StableAdamW", options={"lr": 0.01, "triton": False}),
    *of("transformers", "transformers.optimization", "Adafactor", options={"lr": 0.01, "relative_step": False}),
]
PYTORCH_OPTIMIZER = of(
    "pytorch_optimizer",
    "pytorch_optimizer",
    "ADOPT AdEMAMix AdaBelief AdaMod Adan AdamP CAME Lamb Lion MADGRAD NovoGrad Prodigy QHAdam SOAP SGDP "
    "SGDW ScheduleFreeAdamW ScheduleFreeSGD Shampoo SignSGD StableAdamW Tiger Yogi LARS LaProp Nero",
)
BASES = [*TORCH, *OURS, *OTHERS, *PYTORCH_OPTIMIZER]


def missing(base: Base) -> str | None:
    """Return why a base cannot be tested here, or None."""
    try:
        base.cls()
    except ImportError as error:
        return f"{base.package} is not installed ({error})"
    except AttributeError:
        return f"{base.package} {version(base.package)} has no {base.name}"
    return None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:  # a source tree
        return ""


# ---- programs -------------------------------------------------------------------------------------------------------


def parameters(base: Base) -> list[Any]:
    """Return two matrices and, if the base takes it, a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(16, 40), (40, 8)] + ([] if base.matrices else [(40,)])
    return [nn.Parameter(torch.randn(s, generator=generator) / 4 + 0.01) for s in shapes]


def backward(params: list[Any], step: int) -> None:
    """Give the parameters the gradients of a loss of this step."""
    w1, w2, *bias = params
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 8, (32,), generator=generator)
    hidden = x @ w1
    logits = (hidden + bias[0] if bias else hidden).tanh() @ w2
    for p in params:
        p.grad = None
    nn.functional.cross_entropy(logits, y).backward()


def built(base: Base, params: list[Any], *, sam: float | None, backend: str = "auto") -> Any:
    """Return the optimizer alone, or SAM around it with that rho, in its training mode."""
    cls, options = base.cls(), copy.deepcopy(base.options)
    if sam is None:
        optimizer = cls(params, **options)
    else:
        own = {name: options.pop(name) for name in SAMS if name in options}
        optimizer = SAM(params, cls, rho=sam, backend=backend, base_options=own, **options)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def train(params: list[Any], optimizer: Any, steps: Iterable[int], rho: float) -> None:
    """Take steps of SAM's two passes: with a SAM optimizer, or with any other and the passes in plain torch.

    With rho 0 a step has one pass.
    """
    for step in steps:
        torch.manual_seed(step)  # of base optimizers that draw
        backward(params, step)
        if rho and isinstance(optimizer, SAM):
            optimizer.first_step()
            backward(params, step)
        elif rho:
            clean = [p.detach().clone() for p in params]
            with torch.no_grad():
                norm = sum(p.grad.double().square().sum() for p in params).sqrt()  # type: ignore[union-attr]
                for p in params:
                    p.add_(float(rho * (1 / (norm + 1e-12))) * p.grad)
            backward(params, step)
            with torch.no_grad():
                for p, w in zip(params, clean, strict=True):
                    p.copy_(w)
        optimizer.step()


def distance(params: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference of two lists of weights; 0 for equal bits."""
    if all(torch.equal(p, q) for p, q in zip(params, others, strict=True)):
        return 0.0
    return max(float((p - q).detach().abs().max()) for p, q in zip(params, others, strict=True))


def from_plain(base: Base, rho: float, backend: str) -> float:
    """Return how far five steps of SAM around the base are from those of the base alone."""
    ours, theirs = parameters(base), parameters(base)
    train(ours, built(base, ours, sam=rho, backend=backend), range(5), rho)
    train(theirs, built(base, theirs, sam=None), range(5), rho)
    assert not torch.equal(theirs[0], parameters(base)[0]), "the base moves the weights"
    return distance(ours, theirs)


def after_resume(base: Base, rho: float | None) -> float:
    """Return how far a run that is resumed from a checkpoint is from one that goes on. `rho` None: without SAM."""
    params = parameters(base)
    optimizer = built(base, params, sam=rho)
    train(params, optimizer, range(3), rho or 0.0)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = built(base, others, sam=rho)
    resumed.load_state_dict(saved)
    for each, opt in ((params, optimizer), (others, resumed)):
        train(each, opt, range(3, 6), rho or 0.0)
    return distance(params, others)


# ---- the table ------------------------------------------------------------------------------------------------------


def outcome_words(base: Base) -> tuple[str, str, str]:
    """Return the words of the table: rho 0, rho 0.05, resume."""

    def word(error: float) -> str:
        return "bits" if error == 0 else "rounding" if error <= ROUNDING else f"off by {error:.1g}"

    return word(from_plain(base, 0.0, "auto")), word(from_plain(base, RHO, "reference")), word(after_resume(base, RHO))


HEAD = (
    "| package | base optimizers | rho 0 | rho 0.05 | resume |",
    "|---|---|---|---|---|",
)


def rows(bases: Iterable[Base]) -> list[str]:
    """Return the rows of bases that are installed; those of one package with equal results share a row."""
    found: dict[tuple[str, ...], list[str]] = {}
    for base in bases:
        if missing(base) is None:
            title = f"{base.package} {'' if base.package == 'fused_sam' else version(base.package)}".strip()
            found.setdefault((title, *outcome_words(base)), []).append(f"`{base.name}`")
    return [f"| {title} | {', '.join(names)} | {' | '.join(words)} |" for (title, *words), names in found.items()]


def table_of(page: str) -> list[str]:
    """Return the rows of the table on the page."""
    inside = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    return [line for line in inside.splitlines() if line and line not in HEAD]


def documented(row: str) -> tuple[str, set[str], tuple[str, ...]]:
    """Return package without version, names and words of a row."""
    package, names, *words = [cell.strip() for cell in row.strip("|").split("|")]
    return package.partition(" ")[0], set(re.findall(r"`(\w+)`", names)), tuple(words)


def write(progress: Callable[[str], object] = print) -> None:
    """Replace the rows of the packages that are installed here. The others stay."""
    page = PAGE.read_text()
    old = table_of(page)
    lines = []
    for package in dict.fromkeys(base.package for base in BASES):
        new = rows(base for base in BASES if base.package == package)
        lines += new or [row for row in old if documented(row)[0] == package]
        progress(f"{package}: {'tested' if new else 'not installed, its rows stay'}")
    start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    PAGE.write_text(page[:start] + "\n" + "\n".join([*HEAD, *lines]) + "\n\n" + page[end:])


if __name__ == "__main__":
    write()
