"""The snippets of docs/training.md and docs/integrations.md run in order."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from test_docs_methods import run


def test_the_snippets_on_training(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("training.md")
    assert "tensor(False)" in capsys.readouterr().out
    assert not found["optimizer"].perturbed


def test_the_snippets_on_integrations() -> None:
    for package in ("lightning", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = run("integrations.md")
    assert torch.isfinite(found["loss"])
    accelerate = importlib.import_module("accelerate.state")
    accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.GradientState._reset_state()
