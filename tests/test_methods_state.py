"""Every method of the family resumes and copies bit for bit, and a skipped step changes nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import nets
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers
from support.family import METHODS, built, clean, resume, train

from fused_sam.schedule import Every, Random

every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
def test_resuming_from_a_checkpoint_changes_no_bit(backend: str, method: str, scheduled: bool) -> None:
    schedule = {"schedule": Random(0.6, seed=5)} if scheduled else {}
    model, optimizer = built(method, backend, **schedule)
    train(model, optimizer, range(4))
    clean(optimizer)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    resume(optimizer)
    train(model, optimizer, range(4, 9))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, resumed = built(method, backend, **schedule)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resume(resumed)
    train(other, resumed, range(4, 9))
    assert_same_optimizers(optimizer, resumed)
    assert optimizer.param_groups[0].keys() == resumed.param_groups[0].keys()


@every_method
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_continues_as_the_original(backend: str, method: str, way: str) -> None:
    model, optimizer = built(method, backend, schedule=Every(2))
    train(model, optimizer, range(3))
    clean(optimizer)
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for m, o in (pair, (other, copied)):
        resume(o)
        train(m, o, range(3, 8))
    assert_same_optimizers(optimizer, copied)


@every_method
@pytest.mark.parametrize("passes", [1, 2])
def test_a_non_finite_gradient_changes_nothing(backend: str, method: str, passes: int) -> None:
    model, optimizer = built(method, backend)
    train(model, optimizer, range(3))  # LookSAM's next step has two passes
    before = Snapshot(optimizer)
    nets.loss_of(model, 3).backward()
    two = optimizer.needs_second_pass
    if two:
        if passes == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        optimizer.first_step(zero_grad=True)
        nets.loss_of(model, 3).backward()
    if passes == 2 or not two:
        next(model.parameters()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped
    before.options = [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]  # counters may change
    before.assert_unchanged()
    optimizer.zero_grad()
    train(model, optimizer, range(4, 5))
    assert not optimizer.skipped


@every_method
def test_a_skipped_first_step_leaves_no_state(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    twin, other = built(method, backend)
    nets.loss_of(model, 0).backward()
    if optimizer.needs_second_pass:
        optimizer.first_step(zero_grad=True)
        nets.loss_of(model, 0).backward()
    next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    assert not any(optimizer.state.values())
    clean(optimizer)
    for group in optimizer.param_groups:  # so that counters and random numbers agree
        group.update(optimizer.group_state())
    optimizer.stepper.forget_state()
    resume(optimizer)
    train(model, optimizer, range(1, 5))
    train(twin, other, range(1, 5))
    assert_same_optimizers(optimizer, other)


# The names of each method's own state.
VECTORS = {"LookSAM": "sharpness_direction", "FriendlySAM": "gradient_average"}


@pytest.mark.parametrize("method", VECTORS)
def test_state_starts_after_a_skip_that_the_host_does_not_read(backend: str, method: str) -> None:
    """On an accelerator the host does not read the status. This test keeps the optimizer from reading it on the CPU."""
    model, optimizer = built(method, backend)
    twin, other = built(method, backend)
    optimizer.stepper.status.host = None
    nets.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    nets.loss_of(model, 0).backward()
    next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    name = VECTORS[method]
    assert any(name in entry for entry in optimizer.state.values())
    assert not any(name in entry for entry in optimizer.state_dict()["state"].values())
    for group in optimizer.param_groups:
        group.update({k: 0 for k in ("looksam_step",) if k in group})
    train(model, optimizer, range(1, 5))
    train(twin, other, range(1, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits([p], [q])
        if name in other.state[q]:
            assert_same_bits([optimizer.state[p][name]], [other.state[q][name]])


@pytest.mark.parametrize("method", VECTORS)
def test_state_is_unchanged_by_a_skip_that_the_host_does_not_read(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    train(model, optimizer, range(3))
    optimizer.stepper.status.host = None
    kept = [optimizer.state[p][VECTORS[method]].clone() for p in model.parameters()]
    optimizer.zero_grad()
    nets.loss_of(model, 3).backward()
    optimizer.first_step(zero_grad=True)
    nets.loss_of(model, 3).backward()
    next(model.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped
    assert_same_bits([optimizer.state[p][VECTORS[method]] for p in model.parameters()], kept)
