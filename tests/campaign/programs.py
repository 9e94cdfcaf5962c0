"""Runs a module of the tests as a process of its own, which may crash, hang or be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which a new process imports this package and these tests."""
    places = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), **more}


def run(module: str, *arguments: object, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module`. A process that hangs is killed, and its exit code is that of `timeout`, 124."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    try:
        return subprocess.run(
            command, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as hung:
        out, err = ((x.decode() if isinstance(x, bytes) else x or "") for x in (hung.stdout, hung.stderr))
        return subprocess.CompletedProcess(command, 124, out, f"{err}\nhung for {timeout} s")
