"""Both halves of a step separately under pytest-benchmark: one group per shape and half, one row per peer."""

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
    """Time one half; the other runs untimed, before (second_step) or after (first_step) each round."""
    benchmark.group = f"{shape} {half}"
    rounds = 20 if shape in ("transformer24m", "resnet50") else 100

    def finished(half: str) -> None:
        getattr(peer, half)()
        if DEVICE.type == "cuda":  # the other half's work, too, must not end within the timed part
            torch.cuda.synchronize()

    if half == "first_step":
        benchmark.pedantic(finished, args=(half,), teardown=lambda _: finished("second_step"), rounds=rounds)
    else:
        benchmark.pedantic(finished, args=(half,), setup=lambda: finished("first_step"), rounds=rounds)
