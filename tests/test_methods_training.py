"""Tests of every method in training: loss scaling, masters, accumulation, other base optimizers, schedules."""

from __future__ import annotations

import pytest
import torch
from support import nets
from support.bits import Snapshot, assert_same_bits
from support.family import METHODS, NEED_ADAM, ONE_PASS, built, clean, sam_steps, train
from torch import Tensor, nn

from fused_sam.schedule import AdaptiveSchedule, AfterDecay, Every, LastSteps, Schedule

every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_scaler_does_not_change_the_weights(backend: str, method: str) -> None:
    """Changing loss scales that are powers of two give the same steps, except for rounding at other scales."""
    model, optimizer = built(method, backend)
    twin, plain = built(method, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(nets.loss_of(model, step)).backward()
        if optimizer.needs_grad_scale:
            optimizer.ascent_grad_scale = scaler.get_scale()
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            scaler.scale(nets.loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 2.0**10
    train(twin, plain, range(6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # eps is added to a norm 1000 times as large; fp32 rounding


@every_method
def test_a_scaler_skips_an_overflow(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    train(model, optimizer, range(3))
    before = Snapshot(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    optimizer.ascent_grad_scale = 1024.0
    scaler.scale(nets.loss_of(model, 3)).backward()
    if optimizer.needs_second_pass:
        optimizer.first_step(zero_grad=True)
        scaler.scale(nets.loss_of(model, 3)).backward()
    next(model.parameters()).grad.view(-1)[-1] = float("inf")  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    before.options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    before.assert_unchanged()


def test_friendly_sam_needs_the_scale(backend: str) -> None:
    model, optimizer = built("FriendlySAM", backend)
    scaler = torch.amp.GradScaler("cpu")
    before = Snapshot(optimizer)
    scaler.scale(nets.loss_of(model, 0)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(nets.loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"first_step\(grad_scale=scaler.get_scale\(\)\)"):
        scaler.step(optimizer)
    before.assert_unchanged()
    optimizer.zero_grad()
    scaler.scale(nets.loss_of(model, 0)).backward()
    optimizer.first_step(zero_grad=True, grad_scale=scaler.get_scale())
    scaler.scale(nets.loss_of(model, 0)).backward()
    scaler.step(optimizer)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_masters_stay_near_the_fp32_method(backend: str, method: str, dtype: torch.dtype) -> None:
    """bf16 and fp16 models with masters stay near the fp32 method, and the weights are their rounded masters."""
    torch.manual_seed(0)
    model, twin = nets.net(dtype=dtype), nets.net(dtype=dtype).float()
    extra = {"rho": 0.05, "lr": 0.1, "momentum": 0.9, "backend": backend}
    optimizer = METHODS[method](list(model.parameters()), master_weights=True, **extra)
    plain = METHODS[method](list(twin.parameters()), **extra)
    start = [p.detach().clone() for p in twin.parameters()]
    train(model, optimizer, range(8))
    train(twin, plain, range(8))
    clean(optimizer)
    clean(plain)
    moved = sum(float((q.detach() - s).square().sum()) for q, s in zip(twin.parameters(), start, strict=True)) ** 0.5
    apart = (
        sum(
            float((optimizer.state[p]["master_weight"] - q.detach()).square().sum())
            for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
        ** 0.5
    )
    assert apart < 0.2 * moved  # bf16 gradients have 8 bits, and eight steps add up their errors
    for p in model.parameters():
        assert_same_bits([p], [optimizer.state[p]["master_weight"].to(dtype)])


@every_method
def test_accumulated_gradients_equal_those_of_the_whole_batch(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    twin, whole = built(method, backend)

    def accumulate(step: int) -> None:
        x, y = nets.batch(step)
        for part in (slice(0, 8), slice(8, 32)):
            loss = nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum") / 32
            loss.backward()

    for step in range(5):
        optimizer.zero_grad()
        accumulate(step)
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=True)
            accumulate(step)
        optimizer.step()
    train(twin, whole, range(5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # sums in another order


@every_method
def test_rho_zero_is_the_base_optimizer(backend: str, method: str) -> None:
    model, twin = nets.net(), nets.net()
    optimizer = METHODS[method](list(model.parameters()), rho=0.0, lr=0.1, momentum=0.9, backend="reference")
    base: torch.optim.Optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
    if method in NEED_ADAM:
        base = torch.optim.AdamW(twin.parameters(), lr=0.1, eps=1e-3, foreach=False)
    passes: list[int] = []
    sam_steps(model, optimizer, 4, passes)
    nets.train_plain(twin, base, range(4))
    assert len(passes) == 4
    assert_same_bits(model.parameters(), twin.parameters())


@every_method
def test_other_base_optimizers(backend: str, method: str) -> None:
    """Adam is fused. RMSprop takes its own step on restored weights."""
    for base, extra in ((torch.optim.AdamW, {"betas": (0.8, 0.99)}), (torch.optim.RMSprop, {"momentum": 0.5})):
        if base is torch.optim.RMSprop and (method.startswith("MomentumSAM") or method in NEED_ADAM):
            continue
        runs = []
        for name in (backend, "reference"):
            model = nets.net()
            optimizer = METHODS[method](
                list(model.parameters()), base_optimizer=base, rho=0.1, lr=0.01, backend=name, **extra
            )
            train(model, optimizer, range(5))
            runs.append(list(model.parameters()))
        for p, q in zip(*runs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # the weights have moved by 0.05


SCHEDULES = [Every(3), LastSteps(0.5, 6), AfterDecay(), AdaptiveSchedule(6)]
DECIDE_BEFORE_GRADIENTS = ("ESAM tensors", *ONE_PASS)


@pytest.mark.parametrize(
    ("method", "schedule"),
    [(m, s) for m in METHODS for s in SCHEDULES if not (s.needs_gradients and m in DECIDE_BEFORE_GRADIENTS)],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_step_that_does_not_perturb_takes_one_pass(backend: str, method: str, schedule: Schedule) -> None:
    model, optimizer = built(method, backend, schedule=schedule)
    for step in range(6):
        passes: list[int] = []
        decided = []

        def closure(step: int = step, passes: list[int] = passes, decided: list[bool] = decided) -> Tensor:
            loss = nets.closure_for(model, step, passes)()
            if not decided:
                decided.append(optimizer.needs_second_pass)
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
        assert len(passes) == 1 + decided[0]
