"""Comparisons of tensors and optimizers bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fused_sam.methods.displaced import DisplacedSAM
from fused_sam.testing.tables import same_bits


def assert_same_bits(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(a, b), f"tensor {i} of shape {tuple(a.shape)}: {a.dtype} {a} is not {b.dtype} {b}"


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def stored(optimizer: Optimizer) -> list[Tensor]:
    """Return copies of the weights. Those of one-pass methods are clean, because each step displaces them again."""
    if isinstance(optimizer, DisplacedSAM) and optimizer.displaced and not optimizer.stepper.suspended:
        with optimizer.unperturbed():
            return [p.detach().clone() for p in parameters(optimizer)]
    return [p.detach().clone() for p in parameters(optimizer)]


class Snapshot:
    """A copy of an optimizer's weights, state and options, to compare with later."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = stored(optimizer)
        self.state = [_copied(optimizer.state.get(p, {})) for p in parameters(optimizer)]
        self.options = [_options(group) for group in optimizer.param_groups]

    def assert_unchanged(self) -> None:
        assert_same_bits(stored(self.optimizer), self.weights)
        for p, before in zip(parameters(self.optimizer), self.state, strict=True):
            now = self.optimizer.state.get(p, {})
            assert now.keys() == before.keys()
            for name, value in before.items():
                if isinstance(value, Tensor):
                    assert same_bits(now[name], value), name
                else:
                    assert now[name] == value, name
        assert [_options(group) for group in self.optimizer.param_groups] == self.options


def _copied(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entry.items()}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}


def assert_same_optimizers(a: Optimizer, b: Optimizer) -> None:
    """Check that weights and state of two optimizers are equal, bit for bit."""
    assert_same_bits(parameters(a), parameters(b))
    for p, q in zip(parameters(a), parameters(b), strict=True):
        left, right = a.state.get(p, {}), b.state.get(q, {})
        assert left.keys() == right.keys()
        for name in left:
            x, y = left[name], right[name]
            assert same_bits(x, y) if isinstance(x, Tensor) else x == y, name
