"""Tests of fused_sam.training: frozen batch norm, replayed random numbers, selection, closures, and split batches."""

from __future__ import annotations

import copy
from collections import namedtuple
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bits import same_bits
from torch import Tensor, nn

from fused_sam import SAM, FriendlySAM, StableSAM, Step
from fused_sam.schedule import Schedule
from fused_sam.training import ReplayedRNG, frozen_batch_norm, local_perturbation, paired_closure, select_sharp
from fused_sam.training.batches import leading_samples, selected_samples, split, take

NORMS: dict[str, Any] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),
    "BatchNorm1d, momentum None": lambda: nn.BatchNorm1d(5, momentum=None),
    "BatchNorm1d, no statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(5),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    "InstanceNorm1d, no statistics": lambda: nn.InstanceNorm1d(5),
}


@pytest.fixture(params=NORMS.values(), ids=NORMS.keys())
def norm(request: pytest.FixtureRequest) -> nn.Module:
    layer: nn.Module = request.param()
    layer(torch.randn(7, 5, 3))  # this changes the initial statistics
    return layer


def test_frozen_layers_normalise_as_in_training_and_keep_their_statistics(norm: nn.Module) -> None:
    x, before = torch.randn(7, 5, 3) * 3 + 1, copy.deepcopy(norm.state_dict())
    twin = copy.deepcopy(norm)
    with frozen_batch_norm(norm):
        y = norm(x)
    assert same_bits(y, twin(x))  # both use the batch's statistics
    assert norm.state_dict().keys() == before.keys()
    for name, value in norm.state_dict().items():
        assert same_bits(value, before[name])
    assert same_bits(norm(x), twin(x))
    for name, value in norm.state_dict().items():  # no longer frozen; the twin has counted x twice
        changed = "running" in name or ("tracked" in name and value != 0)  # instance norm never counts batches
        assert torch.equal(value, before[name]) != changed


def test_frozen_inside_frozen_and_through_an_exception(norm: nn.Module) -> None:
    before, x = copy.deepcopy(norm.state_dict()), torch.randn(4, 5, 3)

    def interrupted() -> None:
        with frozen_batch_norm(norm):
            with frozen_batch_norm(norm):
                norm(x)
            norm(x)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    for name, value in norm.state_dict().items():
        assert same_bits(value, before[name])
    norm(x)
    tracked = [name for name, value in norm.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(tracked) == (getattr(norm, "running_mean", None) is not None)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.InstanceNorm1d(5, track_running_stats=True)])
def test_layers_in_eval_mode_are_not_changed(layer: Any) -> None:
    layer(torch.randn(7, 5, 3))
    layer.eval()
    x = torch.randn(7, 5, 3)
    expected, mean = layer(x), layer.running_mean
    with frozen_batch_norm(layer):
        assert layer.running_mean is mean and layer.track_running_stats
        # The batch's statistics would differ by tenths. The last bits depend on the alignment of torch's result.
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.InstanceNorm1d(5, track_running_stats=True)])
def test_evaluating_within_frozen_uses_the_running_statistics(layer: Any) -> None:
    layer(torch.randn(7, 5, 3))
    x = torch.randn(7, 5, 3)
    expected = copy.deepcopy(layer).eval()(x)
    with frozen_batch_norm(layer):
        layer.eval()
        assert same_bits(layer(x), expected)
        layer.train()


def test_a_batch_of_infinities_leaves_the_statistics_finite(norm: nn.Module) -> None:
    with frozen_batch_norm(norm):
        norm(torch.full((3, 5, 4), torch.inf))
    assert all(value.isfinite().all() for value in norm.state_dict().values())


def test_replayed_random_numbers_are_the_first_ones_and_restore_the_generator() -> None:
    torch.manual_seed(3)
    rng = ReplayedRNG()
    first = torch.rand(9)
    expected_after = copy.deepcopy(torch.get_rng_state())
    for _ in range(2):
        with rng:
            assert same_bits(torch.rand(9), first)
            torch.rand(1000)  # the second pass may draw any number
        assert torch.equal(torch.get_rng_state(), expected_after)
    with suppress(KeyError), rng:
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), expected_after)


def test_nested_replaying_is_an_error() -> None:
    rng = ReplayedRNG()
    with rng:
        with pytest.raises(RuntimeError, match="within itself"), rng:
            pass
        assert rng._before is not None
    with rng:
        pass


@pytest.mark.gpu
def test_replayed_random_numbers_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = nn.Linear(2, 2, device="cuda")
    for rng in (ReplayedRNG(), ReplayedRNG.of(model), ReplayedRNG(["cuda:0"])):
        first = torch.rand(9, device="cuda")
        after = torch.cuda.get_rng_state()
        with rng:
            assert same_bits(torch.rand(9, device="cuda"), first)
            torch.rand(7, device="cuda")
        assert torch.equal(torch.cuda.get_rng_state(), after)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 3.0]), min_size=1, max_size=20),  # so few values make ties
    st.floats(0.01, 1.0),
)
def test_selection_keeps_exactly_the_promised_number_of_the_largest_rises(rises: list[float], gamma: float) -> None:
    before = torch.arange(float(len(rises)))
    index = select_sharp(before, before + torch.tensor(rises), gamma)
    assert len(index) == max(1, round(gamma * len(rises))) == len(set(index.tolist()))
    assert index.tolist() == sorted(index.tolist())
    kept = [rises[i] for i in index]
    assert sorted(kept) == sorted(rises)[-len(kept) :]


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, float("nan")])
def test_a_selected_share_out_of_range_is_an_error(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be above 0"):
        select_sharp(torch.zeros(3), torch.ones(3), gamma)


@pytest.mark.parametrize(("before", "after"), [((3,), (4,)), ((), ()), ((0,), (0,)), ((3, 1), (3, 1))])
def test_selection_needs_one_loss_per_sample(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one loss per sample"):
        select_sharp(torch.zeros(before), torch.zeros(after), 0.5)


def test_a_paired_closure_makes_two_equal_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.0)
    x, masks, norm = torch.randn(6, 4), [], model[1]
    model[2].register_forward_hook(lambda _m, _i, y: masks.append(y == 0))

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for step in range(1, 3):
        optimizer.step(paired_closure(closure, model, optimizer))
        assert norm.num_batches_tracked == step
        assert len(masks) == 2 * step
    # The mask is where dropout or the weights give 0. Batch norm's outputs are never exactly 0 here.
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])
    closure()  # the first gradient is from outside, so that there is no mask to replay
    optimizer.step(paired_closure(closure, model, optimizer))
    assert norm.num_batches_tracked == 4 - 1


def test_local_perturbation_needs_data_parallel() -> None:
    model = nn.Linear(2, 1)
    with (
        pytest.raises(TypeError, match="DistributedDataParallel, not Linear"),
        local_perturbation(model, SAM(model.parameters(), lr=0.1)),
    ):
        pass


def test_local_perturbation_is_an_error_if_processes_would_differ() -> None:
    class Wrapped(nn.Linear):
        process_group, no_sync = None, nullcontext

    class Mixing(SAM):
        keeps_ascent_grad = combines_grads = True

    class Steep(Schedule):
        needs_gradients = True

        def due(self, step: Step) -> bool:
            return True

    model = Wrapped(2, 1)
    for optimizer, message in (
        (Mixing(model.parameters(), lr=0.1), "Mixing updates the weights with the first gradient"),
        (FriendlySAM(model.parameters(), lr=0.1), "FriendlySAM averages first gradients, which"),
        (StableSAM(model.parameters(), lr=0.1), r"StableSAM has a descent\(\) that may use the norm of the first"),
        (SAM(model.parameters(), lr=0.1, schedule=Steep()), "Steep decides by the first gradient"),
    ):
        with pytest.raises(ValueError, match=message), local_perturbation(model, optimizer):
            pass


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize("microbatches", [1, 2, 3, 7])
def test_a_batch_of_any_nesting_is_split_into_near_equal_parts(microbatches: int) -> None:
    x, y = torch.randn(7, 2), torch.arange(7)
    batch = {"a": [x, (Pair(x, y), "name")], "temperature": torch.tensor(2.0)}
    parts = split(batch, microbatches)
    assert len(parts) == microbatches and sum(p.weight for p in parts) == pytest.approx(1, abs=1e-15)
    assert {p.size for p in parts} <= {7 // microbatches, 7 // microbatches + 1}
    assert same_bits(torch.cat([p.batch["a"][1][0].y for p in parts]), y)
    assert same_bits(torch.cat([p.batch["a"][0] for p in parts]), x)
    for p in parts:
        assert isinstance(p.batch["a"][1][0], Pair) and p.batch["a"][1][1] == "name" and p.batch["temperature"] == 2
        assert p.weight == pytest.approx((p.size or 0) / 7, abs=1e-15)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_leading_part_has_the_given_share(fraction: float, microbatches: int) -> None:
    y = torch.arange(11)
    parts = leading_samples(split(y, microbatches), fraction)
    wanted = max(1, round(fraction * 11))
    assert same_bits(torch.cat([p.batch for p in parts]), y[:wanted])
    assert sum(p.weight for p in parts) == pytest.approx(1, abs=1e-15)
    assert all(len(p.batch) for p in parts)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_selected_samples_are_taken_from_their_micro_batches(microbatches: int) -> None:
    y = torch.arange(10) * 10
    index = torch.tensor([0, 1, 7, 9])
    parts = selected_samples(split((y, y), microbatches), index)
    assert same_bits(torch.cat([p.batch[0] for p in parts]), y[index])
    assert [p.weight for p in parts] == pytest.approx([len(p.batch[0]) / 4 for p in parts], abs=1e-15)


def test_taking_samples_by_slice_copies_nothing() -> None:
    x = torch.randn(5, 3)
    assert take(x, slice(1, 3)).data_ptr() == x[1:].data_ptr()


@pytest.mark.parametrize(
    ("batch", "microbatches", "message"),
    [
        (torch.zeros(3), 0, "microbatches must be at least 1, not 0"),
        ("text", 2, "found no tensor"),
        (torch.zeros(0, 4), 2, "at least one sample"),
        ((torch.zeros(4, 2), {"mask": torch.zeros(5)}), 2, r"is 4, but batch\[1\]\['mask'\] has 5"),
        (torch.zeros(3), [torch.zeros(3)], "pass the data once"),
        (None, [], "holds no batch"),
    ],
)
def test_batches_that_cannot_be_split_are_errors(batch: Any, microbatches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(batch, microbatches)
