"""A run that SIGKILL ends between any two operations resumes from its last checkpoint, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import killed
from support.campaign import Campaign

TESTS = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", killed.MODES)
def test_a_killed_run_resumes_bit_equal(campaign: Campaign, mode: str) -> None:
    campaign.count(cases=7 * killed.STEPS, faults=7 * killed.STEPS)
    places = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "ignore", "-m", "support.killed", mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.split("\n")[:-1]
    assert done.returncode == 0 and len(lines) == 7 * killed.STEPS, done.stdout + done.stderr
    assert lines == [f"{i} {-signal.SIGKILL} same" for i in range(len(lines))]
