"""Every snippet of docs/recipes.md builds an optimizer that trains, and the classes' defaults are their authors'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_docs_methods import blocks
from torch import Tensor, nn

import fused_sam
from fused_sam import ESAM, SAM
from fused_sam.training import losses, sam_step

PAGE = "recipes.md"
BLOCKS = [source for _, source in blocks(PAGE)]


def names() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found: dict[str, Any] = {"model": model, "steps": 100}
    exec(BLOCKS[0], found)  # the imports
    return found


@pytest.mark.parametrize("k", range(1, len(BLOCKS)))
def test_a_snippet_builds_optimizers_that_train(k: int) -> None:
    before = names()
    found = dict(before)
    exec(BLOCKS[k], found)
    new = [value for name, value in found.items() if before.get(name) is not value]
    optimizers = [o for value in new for o in (value if isinstance(value, list) else [value]) if isinstance(o, SAM)]
    assert optimizers
    model = found["model"]
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    loss = next((value for value in new if isinstance(value, losses.PerPassLoss)), None)

    def ordinary(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        reduction = "none" if isinstance(optimizer, ESAM) else "mean"
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    for optimizer in optimizers:
        before_step = [p.detach().clone() for p in model.parameters()]
        result = sam_step(model, loss or ordinary, batch, optimizer)
        assert not result.skipped
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before_step, strict=True))
        if isinstance(optimizer, fused_sam.MomentumSAM):
            optimizer.eval()


# From the authors' classes and programs, which docs/recipes.md and the docstrings name. A value that is not theirs
# has its reason in the docstring.
AUTHORS: dict[str, dict[str, Any]] = {
    "SAM": {"rho": 0.05},
    "ASAM": {"rho": 0.5, "eta": 0.01, "adaptive": True},
    "ESAM": {"beta": 0.6, "gamma": 0.5, "rho": 0.05},
    "FriendlySAM": {"sigma": 1.0, "lmbda": 0.9, "rho": 0.05},
    "LookSAM": {"k": 5, "alpha": 0.7},
    "MomentumSAM": {"rho": 3.0},
    "WSAM": {"gamma": 0.9, "decouple": True},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_defaults_are_the_authors(name: str) -> None:
    model = nn.Linear(3, 2)
    momentum: Any = {"momentum": 0.9} if name == "MomentumSAM" else {}
    optimizer = fused_sam.METHODS[name](model.parameters(), lr=0.1, **momentum)
    group = optimizer.param_groups[0]
    assert {k: group.get(k, getattr(optimizer, k, None)) for k in AUTHORS[name]} == AUTHORS[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("ASAM", "the public SAM package"), ("ESAM", "their class has 1 and 1"), ("GSAM", "authors' class has no default"),
     ("MomentumSAM", "their class has 0.3"), ("FriendlySAM", "0.9 in the authors' class")],
)  # fmt: skip
def test_a_docstring_says_where_a_default_comes_from(name: str, words: str) -> None:
    assert words in " ".join((fused_sam.METHODS[name].__doc__ or "").split())
