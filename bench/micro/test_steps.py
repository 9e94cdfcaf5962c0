"""Both halves of a step one by one, under pytest-benchmark: a group a shape and half, a row a peer."""

from __future__ import annotations

import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.hyper import Hyper
from bench.machine import device_of
from bench.peers import Peer, choose
from bench.side_by_side import build

DEVICE = device_of(os.environ.get("BENCH_DEVICE", "cpu"))
PEERS, _ = choose(DEVICE, [])
SHAPES = ["transformer24m", "resnet50", "1000x256", "161x1"]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PEERS)
def peer(request: pytest.FixtureRequest, shape: str) -> Peer:
    stepper, _ = build([request.param], shape, DEVICE, Hyper())[request.param]
    for _ in range(3):
        stepper.first_step()
        stepper.second_step()
    return stepper


@pytest.mark.parametrize("half", ["first_step", "second_step"])
def test_step(benchmark: BenchmarkFixture, shape: str, peer: Peer, half: str) -> None:
    """The other half runs before (second_step) or after (first_step) each round, outside the clock."""
    benchmark.group = f"{shape} {half}"
    rounds = 20 if shape in ("transformer24m", "resnet50") else 100

    def finished(half: str) -> None:
        getattr(peer, half)()
        if DEVICE.type == "cuda":  # also of the other half, whose work would end under the clock
            torch.cuda.synchronize()

    if half == "first_step":
        benchmark.pedantic(finished, args=(half,), teardown=lambda _: finished("second_step"), rounds=rounds)
    else:
        benchmark.pedantic(finished, args=(half,), setup=lambda: finished("first_step"), rounds=rounds)
