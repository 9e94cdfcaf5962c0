"""docs/promises.md names tests that exist, and figures of a run that was made."""

from __future__ import annotations

import ast
import json

import pytest

from campaign import promises
from campaign.__main__ import parse


@pytest.mark.parametrize("test", promises.all_tests())
def test_every_test_of_a_promise_exists(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((promises.TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_of_the_campaign_keeps_a_promise() -> None:
    listed = set(promises.all_tests())
    for file in sorted((promises.TESTS / "campaign").glob("test_*.py")):
        if file.name == "test_promises.py":
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "campaign" in [a.arg for a in node.args.args]:
                assert f"campaign/{file.name}::{node.name}" in listed


def test_the_page_has_the_figures_of_a_run() -> None:
    figures = json.loads(promises.FIGURES.read_text())
    assert promises.PAGE.read_text() == promises.page(figures), "python -m campaign.promises > docs/promises.md"
    assert set(figures["tests"]) == set(promises.all_tests())
    for test, found in figures["tests"].items():
        assert found["lost"] == [], test
        assert found["cases"] > 0 or found["skipped"] > 0, test


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--cases", "-1"], ["--seed", "x"]])
def test_wrong_arguments_are_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err
