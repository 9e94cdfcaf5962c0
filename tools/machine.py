"""Prints which of the programs and packages that tools/gpu_check.sh uses this machine has, and their versions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch", "triton", "setuptools", "pybind11", "cmake", "ninja", "numpy", "pytest", "pytest-benchmark", "hypothesis",
    "typer", "rich", "matplotlib",
)  # fmt: skip
PROGRAMS = (["nvidia-smi"], ["nvcc", "--version"], ["g++", "--version"], ["compute-sanitizer", "--version"])


def package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name}: none"


def main() -> None:
    for command in PROGRAMS:
        if shutil.which(command[0]) is None:
            print(f"{command[0]}: not on the path")
        else:
            print(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    print(f"Python {platform.python_version()}, {', '.join(map(package, PACKAGES))}")


if __name__ == "__main__":
    main()
