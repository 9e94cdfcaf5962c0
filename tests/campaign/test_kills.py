"""A run of any method that SIGKILL ends at random moments, in the middle of steps and of writing its checkpoint too.

tests/test_killed.py kills between any two operations of a loop, in four modes with a GradScaler.
"""

from __future__ import annotations

import json
import os

import pytest
from support.campaign import Campaign

from campaign import programs

AT_ONCE = 20  # runs per process, which imports torch once


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_resumes_bit_equal(campaign: Campaign) -> None:
    def run(seeds: list[int]) -> None:
        done = programs.run("campaign.kills", *seeds, timeout=120 + 10 * len(seeds))
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines:
            campaign.count(faults=line["kills"])
            if not line["same"]:
                campaign.lose(str(line))
        if done.returncode or len(lines) < len(seeds):
            campaign.lose(f"the program ended with {done.returncode} after {len(lines)} of {seeds}: {done.stderr}")

    seeds: list[int] = []
    for seed in campaign.rounds(short=3, share=0.12):
        seeds.append(seed)
        if len(seeds) == AT_ONCE:
            run(seeds)
            seeds = []
    if seeds:
        run(seeds)
    assert campaign.figures.faults > 0
