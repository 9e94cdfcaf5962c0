"""Tests of the package's structure: the direction of imports, the calls of a step, and the names a method uses."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import fused_sam

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_sam"

# Layers of the package, lowest first. A module imports from lower layers only.
LAYERS = [
    {"backends", "optimizers", "simple"},  # and the compiled modules
    {"engine", "info"},
    {"step", "rho"},
    {"sam", "schedule"},
    {"methods"},
    {"training"},
    {"integrations", "demo", "analysis", "testing", "__init__"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(file: Path) -> set[str]:
    """Return the names of the package's top-level modules that a file imports, at any place."""
    found = set()
    package = ["fused_sam", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fused_sam" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "fused_sam" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
            elif name == "fused_sam" or (parts[0] == "fused_sam" and parts[1] not in ("_cpu", "_cuda")):
                found.add("__init__")  # the name is an export of the package
    return found


def top_level() -> list[str]:
    return sorted(p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir()
                  if p.suffix == ".py" or (p / "__init__.py").exists())  # fmt: skip


def test_at_most_sixteen_modules_each_in_a_layer() -> None:
    rooms = top_level()
    assert len(rooms) <= 16, rooms
    assert not [room for room in rooms if room not in LEVEL]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_import_runs_upward(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0]
    room = part.removesuffix(".py")
    upward = {name for name in imports_of(file) - {room} if LEVEL[name] >= LEVEL[room]}
    assert not upward, f"{room} imports {upward}, which do not stand below it"


METHOD_FILES = sorted([*(PACKAGE / "methods").glob("*.py"), *(ROOT / "examples" / "methods").glob("*.py")])


@pytest.mark.parametrize("file", METHOD_FILES, ids=lambda f: f.stem)
def test_methods_use_no_private_names(file: Path) -> None:
    found = [
        f"{node.attr} in line {node.lineno}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    ]
    # torch's name of the base class of all batch and instance norms.
    assert not [name for name in found if not name.startswith("_NormBase")], f"{file.name}: {found}"


@pytest.mark.parametrize("file", [f for f in METHOD_FILES if "examples" in f.parts and f.stem != "__init__"],
                         ids=lambda f: f.stem)  # fmt: skip
def test_an_example_method_takes_at_most_thirty_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 30


def test_a_step_after_the_first_ones_runs_at_most_five_files_and_thirty_functions() -> None:
    if fused_sam.backends.available()["cpu"] is not True:
        pytest.skip("fused_sam._cpu is not built")
    params = [nn.Parameter(torch.randn(256)) for _ in range(8)]
    optimizer = fused_sam.SAM(params, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, backend="cpu")
    called: list[tuple[str, str, int]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            called.append((code.co_filename, code.co_qualname if sys.version_info >= (3, 11) else code.co_name,
                           code.co_firstlineno))  # fmt: skip

    def gradients() -> None:
        for p in params:
            p.grad = torch.randn(256)

    for settled in range(4):
        for half in (optimizer.first_step, optimizer.second_step):
            gradients()
            sys.setprofile(note if settled == 3 else None)
            try:
                half()
            finally:
                sys.setprofile(None)
    files = {file for file, *_ in called}
    functions = set(called)
    listing = "\n".join(sorted(f"{Path(file).name}: {name}" for file, name, _ in functions))
    assert len(files) <= 5, listing
    assert len(functions) <= 30, listing
