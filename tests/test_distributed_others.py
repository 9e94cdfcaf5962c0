"""FSDP1 is refused by name; ZeroRedundancyOptimizer and sharded MuonWithAdamW work as SAM's base optimizer."""

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


@pytest.mark.parametrize("way", ["fsdp", "ddp"])
def test_muon_of_sharded_matrices_is_that_of_whole_ones(two: Processes, way: str) -> None:
    expected, norms = spread_others.muon(0, None)
    for found, theirs in two.run(spread_others.muon, way):
        assert theirs[0] == pytest.approx(norms[0], rel=1e-12)  # one norm over all processes and both optimizers
        for p, q in zip(found, expected, strict=True):
            # Muon rounds to bf16; sums of shards have another order. A Newton-Schulz step makes that 3.4 times larger.
            torch.testing.assert_close(p, q, rtol=0, atol=3 * 0.02 * 2**-5 if p.ndim == 2 else 1e-3)
