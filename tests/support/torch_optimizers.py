"""torch's own database of optimizers and their options, and programs that run one of them with SAM and without."""

from __future__ import annotations

import copy
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fused_sam import SAM

_FLAG = "__allow_nonbracketed_mutation_flag"

# Every optimizer class of this version of torch, by name.
CLASSES: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}
REFUSED = {
    "LBFGS": "its step needs a closure, which it calls as often as it likes",
    "SparseAdam": "it takes sparse gradients alone, whose norm and perturbation SAM does not compute",
}
BASES = [name for name in CLASSES if name not in REFUSED]

# Options of torch's optimizers that are named as SAM's are.
_SAMS = ("rho", "adaptive", "eta", "perturb", "eps", "seed", "schedule", "backend", "max_norm")


def database() -> Any:
    """Return torch's module common_optimizers; None if this version of torch has none that can be imported.

    torch's module needs the package expecttest for a base class of tests only, and forbids to set flags such as
    torch.backends.cudnn.benchmark. Both are undone here.
    """
    missing = "expecttest" not in sys.modules
    allowed = vars(torch.backends).get(_FLAG)
    if missing:
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    try:
        from torch.testing._internal import common_optimizers
    except Exception:
        return None
    finally:
        if missing:
            del sys.modules["expecttest"]
        if allowed is not None:
            setattr(torch.backends, _FLAG, allowed)
    return common_optimizers


def sam(params: Any, cls: type[Optimizer], length: float = 0.0, /, **options: Any) -> SAM:
    """Return SAM with that length of perturbation; options that are named as SAM's go to the class by base_options."""
    clashes = {name: options.pop(name) for name in _SAMS if name in options}
    return SAM(params, cls, rho=length, base_options=clashes, **options)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return matrices, which every optimizer takes (Muon takes nothing else)."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((5, 3), (3, 7), (3, 3))]


@torch.enable_grad()
def backward(params: list[Any], step: int) -> None:
    """Give the parameters new gradients of a loss of this step. They may be frozen, as for `differentiable`."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(params[0].dtype)
    w = [p.detach().requires_grad_() for p in params]
    loss = ((x @ w[0]).tanh() @ w[1]).pow(2).mean() + (x @ w[0] @ w[2]).sin().mean()
    for p, g in zip(params, torch.autograd.grad(loss, w), strict=True):
        p.grad = g


def train(params: list[Any], optimizer: Optimizer, steps: range, rho: float = 0.0) -> None:
    """Take steps of SAM's two passes: with a SAM optimizer, or with any other and plain torch."""
    for step in steps:
        backward(params, step)
        if rho and isinstance(optimizer, SAM):
            optimizer.first_step(zero_grad=True)
            backward(params, step)
        elif rho:
            with torch.no_grad():
                clean = [p.clone() for p in params]
                norm = torch.stack([p.grad.double().norm() for p in params]).norm()
                for p in params:
                    p.add_(p.grad, alpha=float(rho / (norm + 1e-12)))
                backward(params, step)
                for p, w in zip(params, clean, strict=True):
                    p.copy_(w)
        optimizer.step()


def distance(params: list[Any], others: list[Any]) -> float:
    """Return the largest difference of two lists of weights."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(params, others, strict=True))


def run(make: Callable[[list[Any]], Optimizer], options: dict[str, Any], rho: float) -> list[Any]:
    """Return weights after five steps."""
    params: list[Any] = parameters()
    if options.get("differentiable"):  # torch refuses weights that require a gradient
        params = [p.detach() for p in params]
    train(params, make(params), range(5), rho)
    return params


def compare(cls: type[Optimizer], options: dict[str, Any], rho: float) -> float:
    """Return how far SAM's weights are from those of the plain class, with SAM's passes written in torch."""
    ours = run(lambda params: sam(params, cls, rho, **copy.deepcopy(options)), options, rho)
    theirs = run(lambda params: cls(params, **copy.deepcopy(options)), options, rho)
    return distance(ours, theirs)
