"""The compiled module is built again while processes use it: they go on with the old one, to the bit.

A linker that writes over a loaded file changes the code of the running process. So a build links elsewhere, and the
module gets to its place by a rename.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.campaign import Campaign

from campaign import programs

ROOT = Path(__file__).resolve().parents[2]
MODULES = list((ROOT / "fused_sam").glob("_cpu.*.so"))
pytestmark = pytest.mark.skipif(not (MODULES and (ROOT / "setup.py").is_file()), reason="needs a build in place")

# In place of CMake: the worst linker, which writes a module over the old one, byte by byte.
CMAKE = """#!{python}
import pathlib, sys
settings = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("-D"))
note = pathlib.Path(__file__).with_name("place")
if settings:
    note.write_text(settings["CMAKE_LIBRARY_OUTPUT_DIRECTORY"])
else:
    folder = pathlib.Path(note.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    module = pathlib.Path({module!r})
    code = module.read_bytes()
    with open(folder / module.name, "r+b" if (folder / module.name).exists() else "wb") as out:
        out.write(bytes(len(code)))  # zeros, as of a link that is half done
        out.flush()
        out.truncate(0)
        out.seek(0)
        out.write(code)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the sources, in which setup.py finds the worst linker."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tree)
    for name in ("fused_sam", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    (tree / "bin").mkdir()
    tool = tree / "bin" / "cmake"
    tool.write_text(CMAKE.format(python=sys.executable, module=str(MODULES[0])))
    tool.chmod(0o755)
    (tree / "cmake.py").write_text(f"CMAKE_BIN_DIR = {str(tree / 'bin')!r}\n")
    return tree


def build(tree: Path, *command: str) -> None:
    environment = programs.environment(FUSED_SAM_CUDA="0")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that trains with the package in a folder, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "campaign.training", str(folder)],
        env=programs.environment(), cwd=folder,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == "ready\n", process.communicate(timeout=30)[1]
        yield process
    finally:
        process.kill()
        process.wait()


def assert_untouched(process: subprocess.Popen[str]) -> None:
    out, error = process.communicate("end\n", timeout=60)
    assert process.returncode == 0, f"ended by {process.returncode}: {error}"
    steps, same = out.split()
    assert same == "True" and int(steps) > 0


@pytest.mark.parametrize("place", ["in place", "build folder"])
def test_a_module_is_replaced_while_a_process_uses_it(campaign: Campaign, tree: Path, place: str) -> None:
    if place == "in place" and not campaign.long:
        pytest.skip("a build and a process of its own: make campaign runs it")
    command = ["build_ext", "--inplace"] if place == "in place" else ["build"]
    build(tree, *command)
    folder = tree if place == "in place" else next(tree.glob("build/lib*"))
    (module,) = (folder / "fused_sam").glob("_cpu.*.so")
    with training(folder) as process:
        first = module.stat().st_ino
        for _ in campaign.rounds(short=1, share=0.01, longest=20):
            build(tree, *command)
            campaign.count(faults=1)
        assert module.stat().st_ino != first
        assert_untouched(process)
    assert module.read_bytes() == MODULES[0].read_bytes()


def test_a_real_build_replaces_the_module_of_a_process(campaign: Campaign, tree: Path) -> None:
    if not campaign.long:
        pytest.skip("it compiles all kernels: make campaign runs it")
    (tree / "cmake.py").unlink()
    campaign.count(cases=1, faults=1)
    build(tree, "build_ext", "--inplace")
    with training(tree) as process:
        kernels = tree / "csrc" / "cpu" / "table.cpp"
        kernels.write_text(kernels.read_text() + "\nnamespace { [[maybe_unused]] int changed = 1; }\n")
        build(tree, "build_ext", "--inplace")
        assert_untouched(process)
