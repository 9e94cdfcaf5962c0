"""The Triton kernels in Triton's interpreter, on CPU tensors, in separate processes.

Triton reads TRITON_INTERPRET when it is imported, so that one process either interprets or compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("triton", minversion="3.6")

# Files of tests, and which of their tests run: all of the first file, and of the others those that every backend runs.
# The contract's tests leave out 16-bit params with fp32 gradients, which the first file covers with the same kernels.
SUITES = {
    "primitives": ("tests/interpreted/primitives.py", ""),
    "rows": ("tests/interpreted/rows.py", ""),
    "contract": ("tests/test_primitives.py", "triton and not float16-float32"),
    "backends": ("tests/test_backends.py", "triton"),
    "steps": ("tests/test_steps.py", "triton"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_interpreted(suite: str) -> None:
    path, keyword = SUITES[suite]
    command = [sys.executable, "-m", "pytest", path, "-k", keyword, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "support.triton_rounding"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.strip().splitlines()[-1])
