"""Processes of data parallel, FSDP2, tensor parallel and 2-D meshes are bit-equal, and equal one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import spread
from support.bits import assert_same_bits, same_bits
from support.processes import Processes
from torch import distributed

from fused_sam import SAM

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

SGD: dict[str, Any] = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, "nesterov": True}
CASES: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "adaptive, clipped": {**SGD, "adaptive": True, "eta": 0.01, "max_norm": 0.3},
    "adamw": {"base_optimizer": torch.optim.AdamW, "rho": 0.1, "lr": 0.01},
    "wrapped": {"base_optimizer": torch.optim.RMSprop, "rho": 0.1, "lr": 0.01},
    "reference": {**SGD, "backend": "reference"},
}


@pytest.fixture(scope="module", params=[2, 4])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    yield from _started(request.param)


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    yield from _started(2)


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    yield from _started(4)


def _started(world: int) -> Iterator[Processes]:
    started = Processes(world)
    yield started
    started.stop()


def assert_like_one_process(found: list[dict[str, Any]], options: dict[str, Any]) -> None:
    alone = spread.train(0, None, 4, SAM, options)
    for other in found[1:]:
        assert_same_bits(other["weights"], found[0]["weights"])
        assert other["norms"] == found[0]["norms"]
        for a, b in zip(other["state"], found[0]["state"], strict=True):
            assert all(same_bits(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    # The limit is float64 rounding in four steps. Sums over the batch have another order.
    for a, b in zip(found[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for norms, expected in zip(found[0]["norms"], alone["norms"], strict=True):
        assert norms == pytest.approx(expected, rel=1e-9)
    assert [set(a) for a in found[0]["state"]] == [set(a) for a in alone["state"]]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("way", ["ddp", "ddp-views", "fsdp", "fsdp-kept", "tensor-parallel"])
def test_equal_to_one_process(processes: Processes, way: str, options: dict[str, Any]) -> None:
    assert_like_one_process(processes.run(spread.train, way, 4, SAM, options), options)


@pytest.mark.parametrize("options", [CASES["sgd"], CASES["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("way", ["hybrid", "tensor-parallel-and-fsdp"])
def test_meshes_of_two_dimensions(four: Processes, way: str, options: dict[str, Any]) -> None:
    assert_like_one_process(four.run(spread.train, way, 4, SAM, options), options)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tensor-parallel"])
def test_sharded_weights_need_one_small_all_reduce_per_pass(two: Processes, way: str) -> None:
    sizes = two.run(spread.count_collectives, way)
    expected = [] if way == "ddp" else [4, 4]  # the sum, the skip flag, and two numbers that compare the processes
    assert sizes == [expected, expected]


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("way", ["fsdp", "tensor-parallel"])
def test_inf_on_one_process_skips_the_step_on_all(two: Processes, way: str, half: str) -> None:
    found = two.run(spread.train_with_inf, way, half)
    for f in found:
        assert f["skipped"]
        assert_same_bits(f["after"], f["before"])
    assert_same_bits(found[0]["last"], found[1]["last"])
    assert not any(torch.equal(a, b) for a, b in zip(found[0]["last"], found[0]["before"], strict=False))


@pytest.mark.parametrize("which", ["all, first", "all, second", "one, first", "one, second"])
def test_missing_gradients_on_one_process_are_an_error_on_all(two: Processes, which: str) -> None:
    for raised, unchanged in two.run(spread.gradients_missing, which):
        assert raised and unchanged


def test_different_parameters_are_an_error_on_all_processes(two: Processes) -> None:
    for error in two.run(spread.other_parameters):
        assert "have different parameters" in error and "parameter 0 of group 0" in error


def test_an_optimizer_built_before_sharding_is_an_error(two: Processes) -> None:
    for error in two.run(spread.built_before_sharding, SAM):
        assert "build the optimizer over the model's parameters after that" in error


LOW = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["master_weights", "stochastic_rounding"])
def test_low_precision_is_bit_equal_on_all_processes(two: Processes, way: str, mode: str) -> None:
    found = two.run(spread.train_low, way, {**LOW, mode: True, "seed": 7})
    assert_same_bits(found[1]["weights"], found[0]["weights"])
    for a, b in zip(found[0]["state"], found[1]["state"], strict=True):
        assert ("master_weight" in a) == (mode == "master_weights")
        assert all(same_bits(a[k], b[k]) for k in a)
        assert all(v.dtype is torch.float32 for v in a.values())


CHECKPOINTED: dict[str, dict[str, Any]] = {"sgd": SGD, "adamw": CASES["adamw"]}


@pytest.mark.parametrize("options", CHECKPOINTED.values(), ids=CHECKPOINTED.keys())
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_distributed_checkpoints_resume_on_any_number_of_processes(
    two: Processes, four: Processes, way: str, options: dict[str, Any], tmp_path: Any
) -> None:
    saved = two.run(spread.save, way, str(tmp_path), options)
    again = two.run(spread.load, way, str(tmp_path), options)
    other = four.run(spread.load, way, str(tmp_path), options)
    for found in (*again, *other):
        assert_same_bits(found["saved"], saved[0]["saved"])
    assert_same_bits(again[0]["end"], saved[0]["end"])
    # The limit is float64 rounding in two steps. Sums over the batch have another order.
    for a, b in zip(other[0]["end"], saved[0]["end"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_values_written_to_sharded_weights_reach_their_masters(two: Processes) -> None:
    assert two.run(spread.masters_follow_writes) == [0.0, 0.0]


def test_a_gradient_in_partial_sums_is_summed_for_a_wrapped_base_too(two: Processes) -> None:
    # The norm of four tens is 20. It is clipped to 0.1, so that each weight moves by 0.05.
    assert two.run(spread.partial_gradient) == pytest.approx([0.95, 0.95], rel=1e-5)


def test_loading_unsharded_state_for_sharded_weights_is_an_error(two: Processes) -> None:
    for error, untouched in two.run(spread.whole_state):
        assert "set_optimizer_state_dict" in error and untouched


def test_replicated_state_is_sharded_like_its_weight(two: Processes) -> None:
    assert two.run(spread.state_spread_otherwise) == [True, True]
