"""The checks of one backend on one device: each primitive for each dtype, and whole steps of each base optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam.backends.contract import (
    ASCENT_NORM,
    INVERSE_NORM,
    SKIP,
    SUM,
    UPDATE_NORM,
    Backend,
    VectorPair,
    status_dtype,
)
from fused_sam.optimizers import Lion, MuonWithAdamW
from fused_sam.sam import SAM

from .tables import BF16, F16, F32, F64, GROUPS, KINDS, PERTURB_GROUPS, Kind, Twins, difference, same_bits, values

Check = Callable[[], str]  # returns what is wrong, or an empty string

VECTOR_DTYPES = ((F32, F32), (F32, BF16), (BF16, BF16), (F16, F32), (F64, F64))

# Base optimizers with options. The eps is far above rounding; with 1e-8, rounding of a gradient near 0 would count.
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    "Lion": (Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop (wrapped)": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),
    "MuonWithAdamW (wrapped)": (MuonWithAdamW, {"lr": 0.02, "adamw_eps": 1e-3}),
}
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float64": (F64, {}),
    "bfloat16-masters": (BF16, {"master_weights": True}),
    "float16-masters": (F16, {"master_weights": True}),
    "bfloat16-stochastic": (BF16, {"stochastic_rounding": True}),
}
STEPS = 3


def checks(backend: Backend, device: torch.device) -> Iterator[tuple[str, str, Check]]:
    """Yield every check of a backend as (subject, dtypes, check). Dtypes without kernels are left out."""
    for kind in KINDS:
        if not backend.supports(device, kind.param, kind.grad):
            continue

        def twins(rule: str = "sgd", kind: Kind = kind, **options: Any) -> Twins:
            return Twins(backend, kind, GROUPS[rule], device=device, **options)

        yield "norm", str(kind), lambda twins=twins: _norm(twins())  # type: ignore[misc]
        yield "squares", str(kind), lambda twins=twins: _squares(twins())  # type: ignore[misc]
        yield "perturb", str(kind), lambda twins=twins: _perturb(twins)  # type: ignore[misc]
        yield "restore", str(kind), lambda twins=twins: _restore(twins())  # type: ignore[misc]
        for rule in GROUPS:
            yield f"update {rule}", str(kind), lambda twins=twins, rule=rule: _update(twins, rule)  # type: ignore[misc]
    for dx, dy in VECTOR_DTYPES:
        if backend.supports(device, dx, dy) or backend.supports(device, dy, dx):
            name = f"{dx}-{dy}".replace("torch.", "")
            yield "vectors", name, lambda dx=dx, dy=dy: _vectors(backend, device, dx, dy)  # type: ignore[misc]
    for title, (cls, options) in BASES.items():
        for precision, (dtype, more) in PRECISIONS.items():
            if not backend.supports(device, dtype, dtype) or (more and title.endswith("(wrapped)")):
                continue

            def steps(cls: Any = cls, options: Any = options, dtype: torch.dtype = dtype, more: Any = more) -> str:
                return _steps(backend.name, device, cls, {**options, **more}, dtype)

            yield f"steps of {title}", precision, steps


# ---- primitives -----------------------------------------------------------------------------------------------------


def _norm(twins: Twins) -> str:
    twins.set_status({SUM: 1e6})  # from an earlier norm
    twins.norm(ascent=True, eps=0.25)
    twins.norm(ascent=False, keep_skip=True, eps=0.25)
    for name, place in (("ascent norm", ASCENT_NORM), ("inverse norm", INVERSE_NORM), ("update norm", UPDATE_NORM)):
        found, wanted = float(twins.status.values[place]), float(twins.twin_status.values[place])
        # fp32 sums of 17,451 squares: 1e-5 is above their rounding, and far below the error of a lost tensor.
        if not abs(found - wanted) <= 1e-5 * abs(wanted):
            return f"the {name} is {found}, and should be {wanted}"
    if float(twins.status.skip):
        return "finite gradients set the skip flag"
    twins.table.grads[1][-1] = math.inf
    twins.norm(ascent=False)
    return "" if float(twins.status.skip) else "an inf does not set the skip flag"


def _squares(twins: Twins) -> str:
    found, wanted = twins.squares()
    # As for a norm: each tensor's sum has the rounding of fp32 at most.
    bad = ~((found - wanted).abs() <= 1e-5 * wanted.abs())
    if bool(bad.any()):
        of, row = (int(k) for k in bad.nonzero()[0])
        what = ("gradients", "params")[of]
        return f"the sum of squares of the {what} of tensor {row} is {found[of, row]}, and should be {wanted[of, row]}"
    return ""


def _perturb(twins: Callable[..., Twins]) -> str:
    masked = [group._replace(mask_prob=0.5) for group in PERTURB_GROUPS]
    for groups in (PERTURB_GROUPS, masked):
        both = twins(perturb_groups=groups)
        before = both.copies()
        both.perturb()
        if found := both.difference():
            return found
        kept = "masters" if both.kind.masters else "backups"
        wanted = before["masters"] if both.kind.masters else before["params"]
        if not _same(getattr(both.table, kept), wanted):
            return f"the {kept} are not the unperturbed params"
    return ""


def _restore(twins: Twins) -> str:
    before = twins.copies()["masters" if twins.kind.masters else "params"]
    twins.perturb()
    twins.restore()
    wanted = [None if t is None else t.to(twins.kind.param) for t in before]
    return "" if _same(twins.table.params, wanted) else "the params are not those before the perturbation, bit for bit"


def _update(twins: Callable[..., Twins], rule: str) -> str:
    for scale, limit in ((None, math.inf), (16.0, 2.5)):
        both = twins(rule)
        both.perturb()
        both.update(scale, limit)
        if found := both.difference():
            return found
    both = twins(rule, perturbed=False)
    both.update()
    if found := both.difference():
        return found
    both = twins(rule)
    both.perturb()
    before = both.copies()
    both.set_status({SKIP: 1.0})
    both.update()
    state: list[list[Tensor | None]] = [before[name] for name in both.table.state]
    if not all(map(_same, both.table.state.values(), state)):
        return "a skipped update changes the state"
    clean = [None if t is None else t.to(both.kind.param) for t in before["masters"] or before["backups"]]
    return "" if _same(both.table.params, clean) else "a skipped update does not restore the params"


def _same(found: Any, wanted: Any) -> bool:
    """Return True if two columns are equal bit for bit."""
    return all(a is None or b is None or same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def _vectors(backend: Backend, device: torch.device, dx: torch.dtype, dy: torch.dtype) -> str:
    def drawn() -> tuple[list[Tensor], list[Tensor]]:
        x, y = ([values((n,), 10 * c + i, d).to(device) for i, n in enumerate((7, 1025, 16385))]
                for c, d in enumerate((dx, dy)))  # fmt: skip
        return x, y

    x, y = drawn()
    sums = torch.full((3,), 1e6, dtype=status_dtype(device), device=device)
    wanted = torch.zeros(3, dtype=F64)
    for p, q in zip(x, y, strict=True):
        u, v = p.double().cpu(), q.double().cpu()
        wanted += torch.stack([(u * v).sum(), (u * u).sum(), (v * v).sum()])
    backend.dot(VectorPair(x, y), sums, reset=True)
    # The terms of <x, y> cancel, so that its limit is relative to the norms.
    if not ((sums.cpu().double() - wanted).abs() <= 1e-5 * (wanted.abs() + wanted[1])).all():
        return f"dot is {sums.tolist()}, and should be {wanted.tolist()}"
    wide = F64 if dx is F64 else F32
    for a, b in ((2.0, -0.5), (0.0, 1.5)):
        x, y = drawn()
        out = [torch.empty_like(t) for t in x]
        expected = [(a * p.to(wide) + b * q.to(wide)).to(dx) for p, q in zip(x, y, strict=True)]
        coefficients = torch.tensor([a, b], dtype=status_dtype(device), device=device)
        backend.axpby(VectorPair(x, y), out, coefficients)
        for i, (found, w) in enumerate(zip(out, expected, strict=True)):
            if message := difference(found, w, f"{a} x + {b} y [{i}]"):
                return message
    x, y = drawn()
    expected = [(0.75 * p.to(wide) + 0.25 * q.to(wide)).to(dx) for p, q in zip(x, y, strict=True)]
    backend.ema(VectorPair(x, y), 0.75)
    for i, (found, w) in enumerate(zip(x, expected, strict=True)):
        if message := difference(found, w, f"ema [{i}]"):
            return message
    return ""


# ---- whole steps ----------------------------------------------------------------------------------------------------


def _steps(name: str, device: torch.device, cls: Any, options: dict[str, Any], dtype: torch.dtype) -> str:
    """Compare steps of SAM on the backend with those on reference: perturbed weights, weights and state."""
    ours, theirs = (_trained(backend, device, cls, options, dtype) for backend in (name, "reference"))
    for what, found in ours.items():
        # Every step adds its own roundings.
        if message := difference(found, theirs[what], what, ulps=32 * STEPS):
            return message
    return ""


def _trained(
    name: str, device: torch.device, cls: Any, options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    shapes = ((33, 20), (1025,), (7, 5), (3,))
    params = [nn.Parameter(values(s, i, dtype).to(device)) for i, s in enumerate(shapes)]
    groups = [{"params": params[:2], "rho": 0.1}, {"params": params[2:], "adaptive": True, "eta": 0.1}]
    # The second gradients of all steps have one sign per element, so that rounding decides no sign of a moving average.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # bf16 weights are checked here, not trained
        optimizer = SAM(groups, cls, backend=name, seed=7, max_norm=30.0, **options)
    found = {}
    for step in range(STEPS):
        for half, call in enumerate((optimizer.first_step, optimizer.second_step)):
            for i, p in enumerate(params):
                g = values(p.shape, 100 + 10 * half + i, F64) * (1 + step * (1 - half) + 0.5 * step)
                p.grad = (g + 0.05 * g.sign()).to(dtype).to(device)
            call()
            for i, p in enumerate(params):
                found[f"{'weight' if half else 'perturbed weight'} {i} of step {step}"] = p.detach().clone()
    for i, p in enumerate(params):
        state = {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        found.update({f"{key} {i}": value.clone() for key, value in state.items()})
    return found
