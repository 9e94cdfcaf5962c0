"""Tests of MicrobatchSAM within a step: wrong calls, bad data, scaling, clipping, schedules and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import nets
from support.bits import Snapshot, assert_same_bits
from torch import Tensor, nn

import fused_sam
from fused_sam.schedule import Every


def parts_of(model: nn.Module, step: int, *, clear: Callable[[], None] | None = None) -> Callable[[int], Tensor]:
    x, y = nets.batch(step)

    def closure(i: int) -> Tensor:
        if clear is not None:
            clear()
        loss = nn.functional.cross_entropy(model(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8])
        loss.backward()
        return loss

    return closure


def microbatched(backend: str, **extra: Any) -> tuple[nn.Module, Any]:
    model = nets.net()
    return model, fused_sam.MicrobatchSAM(
        model.parameters(), rho=0.1, num_microbatches=4, lr=0.1, momentum=0.9, backend=backend, **extra
    )


@pytest.mark.parametrize("scheduled", [False, True])
def test_closures_may_clear_the_gradients(backend: str, scheduled: bool) -> None:
    runs = []
    for way in ("not", "optimizer", "model"):
        model, optimizer = microbatched(backend, **({"schedule": Every(2)} if scheduled else {}))
        clear = {"not": None, "optimizer": optimizer.zero_grad, "model": model.zero_grad}[way]
        for step in range(3):
            optimizer.step(parts_of(model, step, clear=clear))
        runs.append([p.detach().clone() for p in model.parameters()])
    assert_same_bits(runs[0], runs[1])
    for p, q in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_missing_and_additional_microbatches_are_errors(backend: str) -> None:
    model, optimizer = microbatched(backend)
    before = Snapshot(optimizer)
    closure = parts_of(model, 0)
    closure(0)
    optimizer.first_step()
    closure(0)
    with pytest.raises(RuntimeError, match="3 of 4 micro-batches missing"):
        optimizer.second_step()
    optimizer.next_microbatch()
    with pytest.raises(RuntimeError, match="between two micro-batches"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="within a step"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="2 of 4 micro-batches missing"):
        optimizer.step()
    for _ in range(2):
        optimizer.next_microbatch()
    with pytest.raises(RuntimeError, match="after the last of 4"):
        optimizer.next_microbatch()
    optimizer.restore()
    before.assert_unchanged()
    optimizer.step(closure)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_one_bad_microbatch_skips_the_step(backend: str, bad: int) -> None:
    model, optimizer = microbatched(backend)
    optimizer.step(parts_of(model, 0))
    before = Snapshot(optimizer)
    good = parts_of(model, 1)

    def closure(i: int) -> Tensor:
        loss = good(i)
        if i == bad and not optimizer.perturbed:
            next(model.parameters()).grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
        return loss

    optimizer.step(closure)
    assert optimizer.skipped
    before.assert_unchanged()
    optimizer.step(good)
    assert not optimizer.skipped


def test_a_microbatch_that_raises_an_error_changes_nothing(backend: str) -> None:
    model, optimizer = microbatched(backend)
    optimizer.step(parts_of(model, 0))
    before = Snapshot(optimizer)
    good, calls = parts_of(model, 1), []

    def closure(i: int) -> Tensor:
        calls.append(i)
        if len(calls) == 6:
            raise KeyError("data")
        return good(i)

    with pytest.raises(KeyError):
        optimizer.step(closure)
    before.assert_unchanged()
    assert calls == [0, 0, 1, 1, 2, 2]
    optimizer.step(good)


def test_microbatches_under_a_scaler_with_clipping(backend: str) -> None:
    runs = []
    for scale in (None, 512.0):
        model, optimizer = microbatched(backend, max_norm=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            x, y = nets.batch(step)
            for i in range(4):
                for _ in range(2):
                    part = slice(8 * i, 8 * i + 8)
                    scaler.scale(nn.functional.cross_entropy(model(x[part]), y[part])).backward()
                    if not optimizer.perturbed:
                        optimizer.first_step()
                if i < 3:
                    optimizer.next_microbatch()
            scaler.step(optimizer)
            scaler.update()
            norm = float(optimizer.update_norm)
            assert 0.05 < norm < 2  # the norm of the unscaled mean, which is large enough to be clipped
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # the scale is exact; eps is not scaled


def test_a_schedule_is_called_once_per_step_of_several_microbatches(backend: str) -> None:
    asked: list[int] = []

    class CountedCalls(Every):
        def due(self, step: fused_sam.Step) -> bool:
            asked.append(1)
            return super().due(step)

    model, optimizer = microbatched(backend, schedule=CountedCalls(2))
    calls: list[int] = []
    for step in range(4):
        good = parts_of(model, step)
        optimizer.step(lambda i, good=good: [calls.append(i), good(i)][1])
    assert len(asked) == 4
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3] * 2


def test_hooks_run_once_per_step(backend: str) -> None:
    nets.two_steps(model := nets.net(), fused_sam.SAM(model.parameters(), lr=0.1, backend=backend), 0)
    model, optimizer = microbatched(backend)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step(parts_of(model, 0))
    assert seen == [1]
