"""Parameters, gradients and state in memory that no kernel may read, and training with one of them.

A wrong address ends the process, so tests run each case in a process of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fused_sam
from fused_sam import SAM

Params = list[nn.Parameter]
STEPS = 3


class Harmless(torch.Tensor):
    """A subclass with ordinary memory."""


def two(t: Tensor) -> Tensor:
    return TwoTensor(t.detach().clone(), t.detach().clone())


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain() -> Params:
    return [nn.Parameter(values(5, 3, seed=1)), nn.Parameter(values(7, seed=2))]


def negative(t: Tensor) -> Tensor:
    """Return a tensor of these values whose memory has the opposite sign."""
    return torch._neg_view(-t.detach())


def imaginary(t: Tensor) -> Tensor:
    return torch.complex(t.detach(), -t.detach()).conj().imag


# ---- parameters: how a weight is made of its values --------------------------------------------------------------

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": negative,
    "imaginary": imaginary,
    "harmless": lambda t: t.detach().clone().as_subclass(Harmless),
}

# ---- gradients: how one is made of its values ---------------------------------------------------------------------

GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": negative,
    "imaginary": imaginary,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "expanded": lambda t: t.detach().reshape(-1)[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 else t,
    "part": lambda t: torch.cat([t.detach().reshape(-1), torch.ones(9)])[: t.numel()].view(t.shape),
}


def plain_value(kind: str, t: Tensor) -> Tensor:
    """Return the values of that gradient in ordinary memory."""
    if kind == "zero":
        return torch.zeros_like(t)
    if kind == "expanded" and t.dim() == 1:
        return t.detach()[:1].repeat(t.numel())
    return t.detach().clone()


# ---- state -------------------------------------------------------------------------------------------------------

STATE: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": negative,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "expanded": lambda t: t.detach().reshape(-1)[:1].expand(t.numel()).view(t.shape),
}


def gradient(p: Tensor, i: int, step: int, half: int) -> Tensor:
    return torch.sin(p.detach().as_subclass(torch.Tensor) * 2 + values(*p.shape, seed=100 * i + 10 * step + half))


def options(name: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "rho": 0.3},
        "adamw": {"base_optimizer": torch.optim.AdamW, "lr": 0.05, "rho": 0.3},
        "max_norm": {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "max_norm": 0.5},
        "wrapped": {"base_optimizer": torch.optim.RMSprop, "lr": 0.01, "rho": 0.3, "max_norm": 0.5},
    }
    return found[name]


def train(
    params: Params,
    backend: str,
    settings: str,
    assign: Callable[[Params, list[Tensor]], None],
    method: type[SAM] = SAM,
    midway: Callable[[SAM, Params], None] | None = None,
) -> list[Tensor]:
    optimizer = method(params, backend=backend, **options(settings))
    for step in range(STEPS):
        if midway is not None and step == 1:
            midway(optimizer, params)
        assign(params, [gradient(p, i, step, 0) for i, p in enumerate(params)])
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            assign(params, [gradient(p, i, step, 1) for i, p in enumerate(params)])
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in params]


def assign_plainly(params: Params, grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def compare(case: str, kind: str, backend: str, settings: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights after training with the hostile tensors, and with ordinary ones of the same values."""
    if case == "weight":
        hostile = [nn.Parameter(WEIGHTS[kind](p)) for p in plain()[:1]] + plain()[1:]
        return train(hostile, backend, settings, assign_plainly), train(plain(), backend, settings, assign_plainly)
    if case == "grad":

        def assign(params: Params, grads: list[Tensor]) -> None:
            params[0].grad, params[1].grad = grads[0], GRADS[kind](grads[1])

        def expected(params: Params, grads: list[Tensor]) -> None:
            params[0].grad, params[1].grad = grads[0], plain_value(kind, grads[1])

        return train(plain(), backend, settings, assign), train(plain(), backend, settings, expected)
    if case == "state":

        def put(make: Callable[[Tensor], Tensor]) -> Callable[[SAM, Params], None]:
            def midway(optimizer: SAM, params: Params) -> None:
                for p in params:
                    for name, value in optimizer.state[p].items():
                        if value.dim():
                            optimizer.state[p][name] = make(value)

            return midway

        return (
            train(plain(), backend, settings, assign_plainly, midway=put(STATE[kind])),
            train(plain(), backend, settings, assign_plainly, midway=put(lambda t: plain_value_of_state(kind, t))),
        )
    if case == "shared":
        method = getattr(fused_sam, kind) if kind in fused_sam.METHODS else SAM
        both = [train(pair(), backend, settings, share(kind, shared=s), method) for s in (True, False)]
        return both[0], both[1]
    if case == "refused":
        return refused(kind, backend, settings), []
    raise ValueError(case)


def refused(kind: str, backend: str, settings: str) -> list[Tensor]:
    """Fail unless the gradient is refused by name in either half of a step, and nothing has changed."""
    for half in (0, 1):
        params = plain()
        if kind == "wrapped weight":
            params[1] = nn.Parameter(two(params[1]))
        optimizer = SAM(params, backend=backend, **options(settings))
        before = [p.detach().clone() for p in params]
        bad = BAD_GRADS[kind](params[1])
        params[0].grad, params[1].grad = values(5, 3), values(7)
        if half and kind != "wrapped weight":
            optimizer.first_step()
        params[1].grad = bad
        with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
            (optimizer.step if half else optimizer.first_step)()
        assert all(bool((p == b).all()) for p, b in zip(params[:1], before, strict=False)), "a weight has changed"
        assert not optimizer.perturbed and not optimizer.state, "state is left"
    return []


def freed(p: Tensor) -> Tensor:
    g = torch.ones(p.shape)
    g.untyped_storage().resize_(0)
    return g


def smaller(p: Tensor) -> Tensor:
    g = torch.ones(p.shape)
    g.untyped_storage().resize_(8)
    return g


def fake(p: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.ones(7)


BAD_GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapped weight": two,
    "wrapped gradient": two,
    "freed": freed,
    "smaller": smaller,
    "fake": fake,
    "functional": lambda p: torch._to_functional_tensor(torch.ones(7)),
}


def plain_value_of_state(kind: str, t: Tensor) -> Tensor:
    return STATE[kind](t).clone().contiguous() if kind != "zero" else torch.zeros_like(t)


def pair() -> Params:
    return [nn.Parameter(values(6, 3, seed=1)), nn.Parameter(values(6, 3, seed=2)), nn.Parameter(values(4, seed=3))]


def share(kind: str, *, shared: bool) -> Callable[[Params, list[Tensor]], None]:
    """Return a function that assigns gradients of which two share memory, or separate copies of them."""

    def assign(params: Params, grads: list[Tensor]) -> None:
        buffer = torch.cat([g.reshape(-1) for g in grads])
        found: list[Tensor] = [grads[0], grads[0], grads[2]]
        if kind == "overlap":
            found[:2] = buffer[:18].view(6, 3), buffer[5:23].view(6, 3)
        elif kind == "weight itself":
            found[1] = params[1].detach()
        elif kind == "other weight":
            found[1] = params[0].detach()
        elif kind == "inside a row":
            found[2] = grads[0].view(-1)[::4][:4]
        for p, g in zip(params, found, strict=True):
            p.grad = g if shared else g.clone()

    return assign


SHARED = ["same", "overlap", "weight itself", "other weight", "inside a row", "GSAM", "WSAM", "LookSAM", "FriendlySAM"]


def run(results: Any, backend: str, case: str, settings: str, kinds: list[str]) -> None:
    """Compare every kind of one case, and send (kind, "right" or by how much it differs) over a connection."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in kinds:
        got, want = compare(case, kind, backend, settings)
        worst = max(((g - w).abs().max().item() for g, w in zip(got, want, strict=False)), default=0.0)
        finite = all(bool(w.isfinite().all()) for w in want)
        # The two runs may sum the norm in another order: kernels on one side, whole tensors on the other.
        results.send((kind, "right" if worst < 1e-5 and finite else f"off by {worst:.3g}"))
    results.close()
