"""FSDP1 is refused by name, and ZeroRedundancyOptimizer works as SAM's base optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import spread_others
from support.processes import Processes
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    started = Processes(2)
    yield started
    started.stop()


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(two: Processes, use_orig_params: bool) -> None:
    for error in two.run(spread_others.fsdp1, use_orig_params):
        assert "FullyShardedDataParallel (FSDP1)" in error and "fully_shard" in error


def test_zero_redundancy_optimizer_is_a_base_optimizer(two: Processes) -> None:
    expected = spread_others.one_process()
    for found in two.run(spread_others.zero_redundancy_base):
        for p, q in zip(found, expected, strict=True):
            # The limit is float64 rounding in three steps. Sums over the batch have another order.
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
