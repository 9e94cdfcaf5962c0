"""Tests of the methods on two processes, data parallel and sharded. They are bit-equal, and equal to one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import family_spread
from support.bits import assert_same_bits
from support.processes import Processes
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    started = Processes(2)
    yield started
    started.stop()


# Tensor parallel makes centralising sum over sharded dimensions. Buckets of data parallel own the first gradients.
CASES = [
    *((method, "fsdp") for method in family_spread.METHODS),
    *((method, "tensor-parallel") for method in ("GCSAM", "GSAM", "ASAM")),
    *((method, "ddp-views") for method in ("LookSAM", "FriendlySAM", "WSAM")),
]


@pytest.mark.parametrize(("method", "way"), CASES)
def test_two_processes_equal_one(two: Processes, method: str, way: str) -> None:
    found = two.run(family_spread.train, method, way)
    alone, perturbed = family_spread.train(0, method, None)
    for weights, decided in found:
        assert_same_bits(weights, found[0][0])
        assert decided == perturbed
        for p, q in zip(weights, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)  # float64 sums in another order, over five steps
