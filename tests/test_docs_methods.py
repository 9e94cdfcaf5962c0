"""The code of docs/writing-a-method.md runs, and docs/methods.md lists every method with every option.

The blocks of other pages that show fragments run after a preamble that defines the names that they use.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_bits
from torch import nn

import fused_sam
from examples.methods import vasso
from fused_sam import backends
from fused_sam.step import REQUIRED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = "writing-a-method.md"


def blocks(name: str) -> list[tuple[int, str]]:
    """Return the Python blocks of a page, each with the number of lines before it."""
    text = (DOCS / name).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]


def run(name: str, names: dict[str, Any] | None = None, broken: int | None = None) -> dict[str, Any]:
    """Run the blocks of a page in order. Return the names that they defined.

    Args:
        names: names that the page uses and does not define.
        broken: the number of a block that gets a last line with an unknown name.
    """
    found: dict[str, Any] = {"__name__": "page", **(names or {})}
    for k, (line, source) in enumerate(blocks(name)):
        source += "no_such_name\n" if k == broken else ""
        exec(compile("\n" * line + source, str(DOCS / name), "exec"), found)
    return found


# ---- the page on writing a method -----------------------------------------------------------------------------------


def test_the_page_on_writing_a_method_runs() -> None:
    found = run(PAGE)
    assert {"VaSSO", "PlainVaSSO", "UnnormalisedSAM", "StableSAM", "CentredSAM", "Mean", "Mine"} <= found.keys()


@pytest.mark.parametrize("k", range(len(blocks(PAGE))))
def test_a_broken_block_fails(k: int) -> None:
    with pytest.raises(NameError, match="no_such_name"):
        run(PAGE, broken=k)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_fence_is_read(page: str) -> None:
    """A fence that is indented, left open or of an unknown language would hide a block from the tests."""
    fences = [line for line in (DOCS / page).read_text().splitlines() if "```" in line]
    assert {*fences[::2]} <= {"```python", "```sh"} and {*fences[1::2]} <= {"```"}
    assert len(blocks(page)) == fences.count("```python")


def test_the_pages_method_is_the_example(backend: str) -> None:
    """The page's method takes the same steps as examples/methods/vasso.py, bit for bit."""
    ours, theirs = nets.net(), nets.net()
    options = {"theta": 0.3, "rho": 0.1, "lr": 0.1, "momentum": 0.9, "backend": backend}
    optimizers = [
        run(PAGE)["VaSSO"](ours.parameters(), **options),
        vasso.VaSSO(theirs.parameters(), **options),
    ]
    for step in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.step(nets.closure_for(model, step))
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("method", ["VaSSO", "UnnormalisedSAM", "StableSAM", "CentredSAM", "Mean"])
def test_the_pages_methods_take_the_same_steps_under_a_grad_scaler(method: str) -> None:
    """The page promises that vectors and norms do not depend on GradScaler's loss scale."""
    cls = run(PAGE)[method]

    def train(scaler: Any) -> list[nn.Parameter]:
        model = nets.net(dtype=torch.float64)
        optimizer = cls(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
        for step in range(6):
            batch = nets.batch(step, torch.float64)
            fused_sam.training.sam_step(model, loss_fn, batch, optimizer, scaler=scaler)
        return list(model.parameters())

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    scaled = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)  # the scale grows within the run
    for p, q in zip(train(None), train(scaled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["VaSSO", "Mean"])
def test_the_pages_methods_skip_a_step_that_is_not_finite(method: str) -> None:
    """The page promises that a skipped step changes no weight and no state vector, and that counters go on."""
    optimizer = run(PAGE)[method]([p := nn.Parameter(torch.ones(3))], rho=0.1, lr=0.1)
    for bad in (False, True, False):
        before = [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())]
        for _ in range(2):
            p.grad = torch.full((3,), torch.nan if bad else 1.0)
            if optimizer.needs_second_pass and not optimizer.perturbed:
                optimizer.first_step()
        optimizer.step()
        after = [p.detach(), *optimizer.state[p].values()]
        assert bool(optimizer.skipped) == bad
        if bad:
            assert_same_bits(after, before)
        else:
            assert not torch.equal(after[0], before[0])
    if method == "Mean":
        assert optimizer.param_groups[0]["mean_step"] == 3


# ---- the page on the methods of the package -------------------------------------------------------------------------


def rows_of_methods() -> dict[str, str]:
    """Return the rows of the table in docs/methods.md by the method's name."""
    lines = (DOCS / "methods.md").read_text().splitlines()
    return {match[1]: line for line in lines if (match := re.match(r"\| `(\w+)`", line))}


@pytest.mark.parametrize("name", fused_sam.METHODS)
def test_every_method_has_a_row_with_its_options_and_their_defaults(name: str) -> None:
    row = rows_of_methods().get(name)
    assert row is not None, f"docs/methods.md has no row for {name}"
    cls = fused_sam.METHODS[name]
    defaults = {name: declared.default for name, declared in cls.OPTIONS.items()}
    for option, default in {**defaults, **cls.DEFAULTS}.items():
        if default is REQUIRED:
            shown = "required"
        elif isinstance(default, bool):
            shown = str(default)
        else:
            shown = f'"{default}"' if isinstance(default, str) else f"{default:g}"
        if option != "adaptive":  # ASAM is adaptive by definition
            assert f"`{option}` ({shown})" in row, f"the row of {name} lacks `{option}` ({shown})"


# ---- pages with fragments -------------------------------------------------------------------------------------------


def preamble() -> dict[str, Any]:
    """Return a small model, its data and an optimizer, under the names that fragments use."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = fused_sam.SAM(model.parameters(), rho=0.05, lr=0.1, momentum=0.9)
    loss_fn = nn.functional.cross_entropy
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))

    def closure() -> torch.Tensor:
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    return {
        "torch": torch, "fused_sam": fused_sam, "SAM": fused_sam.SAM, "model": model, "optimizer": optimizer,
        "loss_fn": loss_fn, "x": x, "y": y, "closure": closure, "steps": 100,
        "weights": [model[0].weight], "norms": list(model[1].parameters()), "head": list(model[2].parameters()),
        "scaler": torch.amp.GradScaler("cpu"), "scheduler": SimpleNamespace(step=lambda: None),
    }  # fmt: skip


PAGES = ["methods.md", "usage.md", "precision.md", "architecture.md", "losses.md", "bases.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_fragments_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))  # a page may register a backend
    assert blocks(page)
    run(page, preamble())
