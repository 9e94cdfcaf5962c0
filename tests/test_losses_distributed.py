"""Losses that differ between the passes, on two processes: bit-equal, and equal to one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.bits import assert_same_bits
from support.losses import CASES, train_spread
from support.processes import Processes
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    started = Processes(2)
    yield started
    started.stop()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [*CASES, "ReleasedSADT"])
def test_two_processes_equal_one(two: Processes, name: str, way: str) -> None:
    found = two.run(train_spread, name, way)
    assert_same_bits(found[0], found[1])
    for p, q in zip(found[0], train_spread(0, name, None), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)  # float64 sums in another order, over four steps
