"""Tests of the build: errors of one line, a complete source distribution, and modules that load on any processor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_BUILD_FILES = (ROOT / "setup.py").is_file()
pytestmark = pytest.mark.skipif(not HAS_BUILD_FILES, reason="runs in a source tree only")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the sources, to which a build may write."""
    skip = shutil.ignore_patterns(".*", "build", "dist", "results", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=skip))


def setup(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_SAM_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=tree, env={**clean, **env}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def build_error(tree: Path, **env: str) -> str:
    """Return the error line of a build in place that does not start."""
    done = setup(tree, "build_ext", "--inplace", **env)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    return lines[0]


def test_a_wrong_choice_of_cuda_is_an_error(tree: Path) -> None:
    line = build_error(tree, FUSED_SAM_CUDA="bogus")
    assert "FUSED_SAM_CUDA is 'bogus'" in line and "auto" in line


def test_the_error_of_cuda_without_nvcc_names_the_package(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "any.cu").touch()
    line = build_error(tree, FUSED_SAM_CUDA="1", CUDACXX="no-such-nvcc", CUDA_HOME=str(tmp_path))
    assert "nvcc is missing" in line and "apt install" in line


def test_the_error_of_an_nvcc_that_is_too_old_or_broken_names_it(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "any.cu").touch()
    nvcc = tmp_path / "nvcc"
    for said, words in (
        ("Cuda compilation tools, release 11.8, V11.8.89", "is of CUDA 11.8, and 12.0 or newer is needed"),
        ("no version", "names no release"),
    ):
        nvcc.write_text(f"#!/bin/sh\necho '{said}'\n")
        nvcc.chmod(0o755)
        line = build_error(tree, FUSED_SAM_CUDA="1", CUDACXX=str(nvcc))
        assert str(nvcc) in line and words in line and "set CUDA_HOME" in line


def test_the_error_of_a_missing_compiler_names_the_package(tree: Path) -> None:
    assert "apt install g++" in build_error(tree, CXX="no-such-compiler", FUSED_SAM_CUDA="0")
    assert "apt install g++" in build_error(tree, CXX="", PATH=str(tree), FUSED_SAM_CUDA="0")


def test_a_package_without_compiled_modules_needs_no_compiler(tree: Path, tmp_path: Path) -> None:
    nothing = {"CXX": "no-such-compiler", "FUSED_SAM_NATIVE": "0"}
    done = setup(tree, "bdist_wheel", f"--dist-dir={tmp_path}", **nothing)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    script = (  # a package that is installed in place would provide its modules
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]\n"
        "import fused_sam as f; print(f.backends.available()['cpu']); print(f.SAM([f.sam.torch.ones(1)]).backend)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    ).stdout
    assert "fused_sam._cpu is not built" in printed and printed.endswith("foreach\n")
    assert "FUSED_SAM_NATIVE=0" in build_error(tree, FUSED_SAM_CUDA="0", CXX="no-such-compiler")
    assert "leave one of them out" in build_error(tree, FUSED_SAM_CUDA="1", FUSED_SAM_NATIVE="0")


def test_failing_compile_shows_its_first_error(tree: Path) -> None:
    (tree / "csrc" / "bindings" / "cpu.cpp").write_text("int wrong() { return no_such_name; }\n")
    for kernels in (tree / "csrc" / "cpu").glob("*.cpp"):
        kernels.write_text("")
    done = setup(tree, "build_ext", "--inplace", FUSED_SAM_CUDA="0")
    assert done.returncode == 1
    assert "no_such_name" in done.stderr and "The whole log:" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 20


def test_the_source_distribution_is_complete(tree: Path, tmp_path: Path) -> None:
    done = setup(tree, "sdist", "--formats=gztar", f"--dist-dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(tree)) for path in (tree / "fused_sam").rglob("*.py")}
    wanted |= {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    wanted |= {"examples/README.md"}  # docs/ and README.md link to it
    assert wanted <= inside


def test_the_version_is_in_one_place() -> None:
    import fused_sam

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared.group(1) in (ROOT / "CHANGELOG.md").read_text()
    if fused_sam.__version__ == "0+unknown":
        pytest.skip("the package is not installed: `make` or `pip install -e .` does it")
    assert fused_sam.__version__ == declared.group(1)


def test_all_names_exist_after_one_import() -> None:
    program = "import fused_sam; [getattr(fused_sam, name) for name in fused_sam.__all__]; fused_sam.training.sam_step"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_wide_kernels_share_no_symbol() -> None:
    """The linker could choose an inline function's AVX-512 copy, which an older processor cannot run."""
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/kernels_avx*.dir/**/kernels.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an x86-64 build here")
    for path in objects:
        table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r" [uVW] .*", table), path


def test_no_file_names_a_package_registry() -> None:
    """The user's pip configuration names package registries, and this tree does not."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    # The names are in pieces, so that this file does not contain them.
    parts = [("pypi", "."), ("python", "hosted"), ("download.", "pytorch"), ("anaconda", "."), ("npm", "js")]
    names = [first + second for first, second in parts]
    hosts = re.compile("|".join(map(re.escape, names)).encode())
    files = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    named = [path for path in files if path.is_file() and hosts.search(path.read_bytes())]
    assert not named
