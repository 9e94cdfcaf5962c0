"""Tests of fused_sam.simple: each method in plain torch takes the fused class's steps, and stays short."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_sam
from fused_sam import simple

STEPS, PARTS, PART = 8, 3, 5  # steps; micro-batches per batch; samples per micro-batch
MAX_LINES = 20

# Both sides compute in float64 and differ only in the order of their operations. After eight steps the weights differ
# by 5e-16, and those near zero by 1e-12 of their value. A wrong term or option changes them by far more than 1e-10.
RTOL, ATOL = 1e-10, 1e-13

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("SAM", {}),
    ("SAM", {"rho": 0.3}),
    ("ASAM", {}),
    ("ASAM", {"rho": 0.8, "eta": 0.05}),
    ("ASAM", {"rho": 0.8, "eta": 0.0, "scale": "all"}),
    ("MicrobatchSAM", {"num_microbatches": 1}),
    ("MicrobatchSAM", {"rho": 0.3, "num_microbatches": PARTS}),
    ("GSAM", {}),
    ("GSAM", {"rho": 0.3, "alpha": 0.7}),
    ("LookSAM", {}),
    ("LookSAM", {"rho": 0.3, "k": 3, "alpha": 0.2}),
    ("LookSAM", {"rho": 0.3, "k": 1}),
    ("FriendlySAM", {}),
    ("FriendlySAM", {"rho": 0.3, "sigma": 0.8, "lmbda": 0.9}),
    ("MomentumSAM", {}),
    ("MomentumSAM", {"rho": 0.5}),
]
each_method = pytest.mark.parametrize(
    ("name", "options"), METHODS, ids=[" ".join([n, *(f"{k}={v}" for k, v in o.items())]) for n, o in METHODS]
)

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
each_base = pytest.mark.parametrize("base", BASES)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3)).double()


@dataclass
class Run:
    """A two-layer net with its training batches and its number of passes so far."""

    model: nn.Module = field(default_factory=_net)
    passes: int = 0

    def groups(self) -> list[dict[str, Any]]:
        """Return the weights as one group and the biases as another, which has its own options."""
        params = list(self.model.parameters())
        return [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() == 1], "lr": 0.03, "weight_decay": 0.0},
        ]

    def closure(self, step: int, num_microbatches: int, factor: float = 1.0) -> Callable[..., Tensor]:
        """Return the closure of a step, for the whole batch or for its micro-batch i."""
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(PARTS * PART, 7, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (PARTS * PART,), generator=generator)

        def closure(i: int = 0) -> Tensor:
            self.passes += 1
            part = slice(None) if num_microbatches == 1 else slice(i * PART, (i + 1) * PART)
            loss = factor * nn.functional.cross_entropy(self.model(x[part]), y[part])
            loss.backward()
            return loss

        return closure


def both(name: str, base: str, options: dict[str, Any]) -> tuple[Run, Any, Run, Any]:
    """Return the plain and the fused optimizer of this name, each with its own net."""
    cls, base_options = BASES[base]
    plain, fused = Run(), Run()
    params, optimizer = plain.model.parameters(), cls(plain.groups(), **base_options)
    return (
        plain,
        getattr(simple, name)(params, optimizer, **options),
        fused,
        getattr(fused_sam, name)(fused.groups(), cls, **options, **base_options),
    )


def assert_same(plain: Run, fused: Run, when: str) -> None:
    for (name, p), q in zip(plain.model.named_parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{when}, {name}: {text}")


@each_base
@each_method
def test_every_step_equals_the_fused_one(name: str, base: str, options: dict[str, Any]) -> None:
    plain, simple_optimizer, fused, fused_optimizer = both(name, base, options)
    parts = options.get("num_microbatches", 1)
    for step in range(STEPS):
        loss = simple_optimizer.step(plain.closure(step, parts))
        expected = fused_optimizer.step(fused.closure(step, parts))
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=RTOL, atol=ATOL)
        with fused_optimizer.unperturbed():  # MomentumSAM's weights are displaced between steps
            assert_same(plain, fused, f"step {step}")
        assert plain.passes == fused.passes
    assert not torch.equal(next(plain.model.parameters()), next(_net().parameters()))


@each_method
def test_a_gradient_of_zero_leaves_the_weights_finite(name: str, options: dict[str, Any]) -> None:
    """With k=3, LookSAM takes two passes in step 3. It keeps a direction of zero for the next two steps."""
    plain, simple_optimizer, fused, fused_optimizer = both(name, "SGD", options)
    parts = options.get("num_microbatches", 1)
    for step in range(STEPS):
        factor = 0.0 if step in (0, 3) else 1.0
        simple_optimizer.step(plain.closure(step, parts, factor))
        fused_optimizer.step(fused.closure(step, parts, factor))
        with fused_optimizer.unperturbed():
            assert_same(plain, fused, f"step {step}")
        assert all(p.isfinite().all() for p in plain.model.parameters())


@each_base
def test_momentum_sam_displaces_by_the_momentum(base: str) -> None:
    """The fused class's parameters stay displaced between steps. Those of the plain class do not."""
    plain, simple_optimizer, fused, fused_optimizer = both("MomentumSAM", base, {"rho": 0.5})
    assert simple_optimizer.displacement() is None
    for step in range(STEPS):
        simple_optimizer.step(plain.closure(step, 1))
        fused_optimizer.step(fused.closure(step, 1))
        shift = simple_optimizer.displacement()
        assert float(simple.norm(shift)) == pytest.approx(0.5, rel=1e-9)
        for p, e, q in zip(plain.model.parameters(), shift, fused.model.parameters(), strict=True):
            torch.testing.assert_close(p + e, q, rtol=RTOL, atol=ATOL)
        fused_optimizer.eval()
        assert_same(plain, fused, f"step {step}")
        fused_optimizer.train()


def test_the_module_has_no_other_method_than_those_tested() -> None:
    assert {c.name for c in _classes()} == {name for name, _ in METHODS}


def test_the_example_of_the_docstring_runs() -> None:
    assert simple.__doc__ is not None
    lines = simple.__doc__.split("\n\n", 1)[1].split("\n\nw are", 1)[0].splitlines()
    model = _net()
    before = [p.detach().clone() for p in model.parameters()]
    names = {
        **vars(simple),
        "model": model,
        "loss_fn": nn.functional.cross_entropy,
        "x": torch.randn(5, 7, dtype=torch.float64),
        "y": torch.tensor([0, 1, 2, 0, 1]),
    }
    exec("\n".join(line[4:] for line in lines), names)
    assert names["loss"].isfinite()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_module_needs_only_torch() -> None:
    """A reader may copy the file into a project without fused_sam."""
    modules = set()
    for node in ast.walk(_tree()):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    assert modules == {"__future__", "collections.abc", "torch", "torch.optim"}


@pytest.mark.parametrize("name", sorted({name for name, _ in METHODS}))
def test_a_method_stays_short(name: str) -> None:
    """The limit is on lines of code, without docstrings, comments and empty lines."""
    (node,) = (c for c in _classes() if c.name == name)
    source = inspect.getsource(simple).splitlines()
    lines = set(range(node.lineno, (node.end_lineno or 0) + 1))
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
            lines -= set(range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1))
    code = [n for n in lines if source[n - 1].strip() and not source[n - 1].strip().startswith("#")]
    assert len(code) <= MAX_LINES, f"{name} takes {len(code)} lines: is it still the method on one screen?"


def _tree() -> ast.Module:
    return ast.parse(inspect.getsource(simple))


def _classes() -> list[ast.ClassDef]:
    return [node for node in _tree().body if isinstance(node, ast.ClassDef)]
