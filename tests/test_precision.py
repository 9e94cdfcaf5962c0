"""Tests of bf16 and fp16 weights: fp32 masters, stochastic rounding, and the warning if neither is used."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.bits import Snapshot, assert_same_bits, assert_same_optimizers
from support.draws import LAYOUTS, ODD_SHAPES, doubled, draw_passes, set_gradients, take_steps, values, weights
from support.nets import loss_of, net, train, two_steps
from torch import Tensor, nn
from torch.amp import GradScaler

from fused_sam import SAM
from fused_sam.engine.rounding import RoundingWarning

LOW = [torch.bfloat16, torch.float16]
BASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "amsgrad": True},
}


def masters_of(optimizer: SAM, params: list[nn.Parameter]) -> list[Tensor]:
    """Return the masters of all weights that have state."""
    return [optimizer.state[p]["master_weight"] for p in params if p in optimizer.state]


# ---- masters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_masters_take_the_trajectory_of_fp64(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = weights(ODD_SHAPES, dtype)
    twin = doubled(params)
    passes = draw_passes(params, 4)
    half = len(params) // 2
    optimizer = SAM([{"params": params[:half], "rho": 0.4}, {"params": params[half:], "lr": 0.02}], rho=0.2,
                    master_weights=True, backend=backend, **options)  # fmt: skip
    other = SAM([{"params": twin[:half], "rho": 0.4}, {"params": twin[half:], "lr": 0.02}], rho=0.2,
                backend="reference", **options)  # fmt: skip
    perturbed = take_steps(optimizer, params, passes)
    expected = take_steps(other, twin, [tuple([g.double() for g in p] for p in both) for both in passes])  # type: ignore[misc]
    for p, q, m in zip(params, twin, masters_of(optimizer, params), strict=True):
        # The limit is fp32's rounding in four steps of numbers near 1. Adam's first steps divide by small roots.
        torch.testing.assert_close(m.double(), q.detach(), rtol=3e-5, atol=3e-6)
        assert torch.equal(p, m.to(dtype)), "a weight must be its master, rounded once"
    for found, wanted in zip(perturbed[-1], expected[-1], strict=True):
        # The perturbed weight is rounded once to its dtype.
        ulp = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-10
        torch.testing.assert_close(found.double(), wanted, rtol=ulp, atol=1e-6)


def test_masters_replace_the_backups() -> None:
    params = weights([(1000,)], torch.bfloat16)
    optimizer = SAM(params, lr=0.1, momentum=0.9, master_weights=True)
    take_steps(optimizer, params, draw_passes(params, 2))
    assert not optimizer.stepper.plan._backups
    assert set(optimizer.state[params[0]]) == {"momentum_buffer", "master_weight"}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("half", [0, 1])
def test_an_overflow_changes_no_bit_of_masters_and_weights(backend: str, half: int, scaled: bool) -> None:
    params = weights([(33,), (7, 3)], torch.bfloat16)
    optimizer = SAM(params, lr=0.1, momentum=0.9, master_weights=True, backend=backend)
    take_steps(optimizer, params, draw_passes(params, 2))
    before = Snapshot(optimizer)
    passes = draw_passes(params, 1, seed=9)[0]
    passes[half][1][2, 1] = float("inf")
    if scaled:
        optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(half == 1))  # type: ignore[attr-defined]
    take_steps(optimizer, params, [passes])
    assert optimizer.skipped and optimizer.step_was_skipped
    before.assert_unchanged()


def test_an_exception_changes_nothing_with_masters(backend: str) -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, master_weights=True, backend=backend)
    train(model, optimizer, range(2))
    before = Snapshot(optimizer)

    def fails() -> Tensor:
        loss = loss_of(model, 5)
        loss.backward()
        if optimizer.perturbed:
            raise KeyError("in the second pass")
        return loss

    with pytest.raises(KeyError):
        optimizer.step(fails)
    before.assert_unchanged()


@pytest.mark.parametrize("options", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("mode", ["master_weights", "stochastic_rounding"])
def test_resume_is_bit_equal(backend: str, mode: str, options: dict[str, Any], tmp_path: Any) -> None:
    settings = {**options, "rho": 0.1, mode: True, "seed": 11, "backend": backend}
    model = net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), **settings)
    train(model, optimizer, range(3))
    copied_model, copied = copy.deepcopy((model, optimizer))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    train(model, optimizer, range(3, 6))
    fresh = net(seed=5, dtype=torch.bfloat16)
    resumed = SAM(fresh.parameters(), **settings)
    two_steps(fresh, resumed, 0)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, range(3, 6))
    assert_same_optimizers(resumed, optimizer)
    train(copied_model, copied, range(3, 6))
    assert_same_optimizers(copied, optimizer)


def test_weights_that_the_user_loads_reach_their_masters(backend: str) -> None:
    params = weights([(50,), (3, 4)], torch.bfloat16)
    optimizer = SAM(params, rho=0.0, lr=0.0, master_weights=True, backend=backend)
    take_steps(optimizer, params, draw_passes(params, 1))
    with torch.no_grad():
        optimizer.state[params[0]]["master_weight"].add_(1e-5)  # below bf16's precision: the weight does not change
        params[1].copy_(values((3, 4), 77, torch.bfloat16))
    unchanged = optimizer.state[params[0]]["master_weight"].clone()
    take_steps(optimizer, params, draw_passes(params, 1))
    assert_same_bits(optimizer.state[params[1]]["master_weight"].to(torch.bfloat16)[None], [params[1].detach()])
    assert_same_bits([params[1].detach()], [values((3, 4), 77, torch.bfloat16)])
    assert_same_bits([optimizer.state[params[0]]["master_weight"]], [unchanged])


def test_a_step_starts_from_masters_that_the_user_replaced(backend: str) -> None:
    params = weights([(50,), (3, 4)], torch.bfloat16)
    twin = weights([(50,), (3, 4)], torch.bfloat16)
    optimizer = SAM(params, rho=0.3, lr=0.1, master_weights=True, backend=backend)
    other = SAM(twin, rho=0.3, lr=0.1, master_weights=True, backend=backend)
    passes = draw_passes(params, 2)
    take_steps(optimizer, params, passes)
    take_steps(other, twin, passes)
    for p, q in zip(params, twin, strict=True):
        optimizer.state[p]["master_weight"] = optimizer.state[p]["master_weight"] + 0.125
        other.state[q]["master_weight"].add_(0.125)
    for found, expected in zip(take_steps(optimizer, params, passes), take_steps(other, twin, passes), strict=True):
        assert_same_bits(found, expected)
    assert_same_optimizers(optimizer, other)


def test_checkpoints_of_plain_sgd_and_masters_load_each_other() -> None:
    model, twin = net(dtype=torch.bfloat16), net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9, master_weights=True)
    train(model, optimizer, range(2))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    loss_of(twin, 0).backward()
    plain.step()
    back = SAM(twin.parameters(), lr=0.1, momentum=0.9, master_weights=True)
    state = plain.state_dict()
    for entry in state["state"].values():
        entry.pop("master_weight")
    back.load_state_dict(state)
    train(twin, back, range(2))


def test_only_low_precision_weights_have_masters(backend: str) -> None:
    params = [*weights([(40,)], torch.bfloat16), *weights([(40,)], torch.float32)]
    optimizer = SAM(params, rho=0.3, lr=0.1, momentum=0.9, master_weights=True, backend=backend)
    take_steps(optimizer, params, draw_passes(params, 3))
    assert "master_weight" in optimizer.state[params[0]] and "master_weight" not in optimizer.state[params[1]]
    optimizer.add_param_group({"params": weights([(9,)], torch.bfloat16, seed=3)})
    assert_same_bits([optimizer.state[params[0]]["master_weight"].to(torch.bfloat16)], [params[0].detach()])


def test_a_group_added_while_perturbed_gets_masters(backend: str) -> None:
    params = weights([(40,)], torch.bfloat16)
    optimizer = SAM(params, rho=0.3, lr=0.1, master_weights=True, backend=backend)
    set_gradients(params, draw_passes(params, 1)[0][0])
    optimizer.first_step()
    (late,) = weights([(9,)], torch.bfloat16, seed=3)
    before = late.detach().float()
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full_like(late, 2.0**-12)
    optimizer.second_step()
    master = optimizer.state[late]["master_weight"]
    torch.testing.assert_close(master, before - 0.1 * 2.0**-12, rtol=0, atol=2.0**-23)  # one rounding near 1
    assert_same_bits([late], [master.bfloat16()])


def _conv(layout: str) -> nn.Parameter:
    return nn.Parameter(LAYOUTS[layout](values((4, 6, 3, 5), 1, torch.bfloat16)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_of_every_layout_are_equal(backend: str, layout: str) -> None:
    p, twin = _conv(layout), _conv("contiguous")
    options: dict[str, Any] = {"rho": 0.2, "lr": 0.1, "momentum": 0.9, "master_weights": True, "backend": backend}
    optimizer, other = SAM([p], **options), SAM([twin], **options)
    passes = draw_passes([twin], 4)
    take_steps(optimizer, [p], passes)
    take_steps(other, [twin], passes)
    # The layouts sum the norm's squares in different orders.
    torch.testing.assert_close(optimizer.state[p]["master_weight"], other.state[twin]["master_weight"].contiguous(),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("between", [False, True], ids=["between steps", "between passes"])
@pytest.mark.parametrize("masters", [False, True])
def test_weights_that_change_their_layout(backend: str, masters: bool, between: bool) -> None:
    dtype = torch.bfloat16 if masters else torch.float32
    p, twin = (nn.Parameter(values((4, 6, 3, 5), 1, dtype)) for _ in range(2))
    options: dict[str, Any] = {"rho": 0.2, "lr": 0.1, "momentum": 0.9, "backend": backend}
    options.update({"master_weights": True} if masters else {})
    optimizer, other = SAM([p], **options), SAM([twin], **options)
    for step, (first, second) in enumerate(draw_passes([twin], 4)):
        for half, (one, gradients) in enumerate(((optimizer.first_step, first), (optimizer.second_step, second))):
            if step == 2 and half == int(between):
                p.data = p.data.contiguous(memory_format=torch.channels_last)
            p.grad = gradients[0].contiguous(memory_format=torch.channels_last) if step >= 2 else gradients[0].clone()
            one(zero_grad=True)
            twin.grad = gradients[0].clone()
            (other.first_step if half == 0 else other.second_step)(zero_grad=True)
    found = optimizer.state[p]["master_weight"] if masters else p.detach()
    expected = other.state[twin]["master_weight"] if masters else twin.detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the layouts sum in different orders


def test_a_group_or_another_dtype_between_the_passes(backend: str) -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, master_weights=True, backend=backend)
    train(model, optimizer, range(2))
    clean = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 2).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.add_param_group({"params": weights([(9,)], torch.bfloat16, seed=3)})
    model.float()
    optimizer.restore()
    for p, w in zip(model.parameters(), clean, strict=True):
        assert torch.equal(p.detach().to(torch.bfloat16), w)
    two_steps(model, optimizer, 2)


def test_loading_another_optimizers_state_keeps_the_rng_offset() -> None:
    params = weights([(50,)], torch.bfloat16)
    optimizer = SAM(params, rho=0.1, lr=0.1, momentum=0.9, stochastic_rounding=True)
    take_steps(optimizer, params, draw_passes(params, 3))
    state = torch.optim.SGD(params, lr=0.1, momentum=0.9).state_dict()
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"][0]["rng_offset"] == 6


@pytest.mark.parametrize("mode", ["master_weights", "stochastic_rounding"])
def test_options_for_low_precision_need_low_precision(mode: str) -> None:
    with pytest.raises(ValueError, match=f"{mode}=True is for bf16 and fp16 weights"):
        SAM(weights([(3,)], torch.float32), lr=0.1, **{mode: True})


def test_masters_and_stochastic_rounding_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="choose masters for the best result"):
        SAM(weights([(3,)], torch.bfloat16), lr=0.1, master_weights=True, stochastic_rounding=True)


@pytest.mark.parametrize("mode", ["master_weights", "stochastic_rounding"])
def test_both_modes_need_a_fused_base(mode: str) -> None:
    with pytest.raises(ValueError, match=f"{mode} needs a fused base optimizer"):
        SAM(weights([(3,)], torch.bfloat16), torch.optim.RMSprop, lr=0.1, **{mode: True})


# ---- stochastic rounding -----------------------------------------------------------------------------------------


def mean_perturbation(mode: dict[str, Any], backend: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return the mean of e over 200 perturbations: its length over rho, and its cosine with the gradient."""
    (p,) = weights([(3000,)], dtype)
    g = values((3000,), 5, dtype)
    optimizer = SAM([p], rho=0.01, lr=0.0, backend=backend, **mode)
    total = torch.zeros(3000, dtype=torch.float64)
    for _ in range(200):
        set_gradients([p], [g])
        before = p.detach().double()
        optimizer.first_step()
        total += p.detach().double() - before
        optimizer.restore()
    mean = total / 200
    return float(mean.norm() / 0.01), float(torch.nn.functional.cosine_similarity(mean, g.double(), dim=0))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_stochastic_rounding_has_the_right_mean(backend: str, dtype: torch.dtype) -> None:
    # One draw's noise is half a gap: in bf16 about 0.1 per weight times sqrt(3000). The mean of 200 draws has 1/14.
    # With rho = 0.01, the cosine is low but clearly positive. Rounding to nearest moves no weight, so its cosine is 0.
    _, cosine = mean_perturbation({"stochastic_rounding": True}, backend, dtype)
    _, nearest = mean_perturbation({}, backend, dtype)
    assert cosine > (0.1 if dtype is torch.bfloat16 else 0.5)
    assert cosine > nearest + 0.05 or nearest > 0.99


def test_equal_seeds_give_equal_bits_and_other_seeds_differ(backend: str) -> None:
    def run(seed: int) -> list[Tensor]:
        params = weights([(2000,), (33, 3)], torch.bfloat16)
        optimizer = SAM(params, rho=0.1, lr=0.01, momentum=0.9, stochastic_rounding=True, seed=seed, backend=backend)
        perturbed = take_steps(optimizer, params, draw_passes(params, 2))
        return [*perturbed[0], *perturbed[1], *(p.detach() for p in params)]

    first, again, other = run(1), run(1), run(2)
    assert_same_bits(first, again)
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_backends_round_by_the_same_random_numbers(backend: str) -> None:
    def run(name: str) -> list[Tensor]:
        params = weights([(2000,), (33, 3), (16385,)], torch.float16)
        optimizer = SAM(params, rho=0.1, lr=0.01, momentum=0.9, stochastic_rounding=True, seed=5, backend=name)
        take_steps(optimizer, params, draw_passes(params, 2))
        return [p.detach() for p in params]

    for a, b in zip(run(backend), run("reference"), strict=True):
        # If fp32 sums differ in their last bit, about one in some thousand weights rounds to its other neighbour.
        assert (a != b).float().mean() < 0.002
        torch.testing.assert_close(a, b, rtol=2.0**-9, atol=1e-4)


def test_small_updates_are_not_lost() -> None:
    (p,) = (nn.Parameter(torch.ones(20000, dtype=torch.bfloat16)),)
    optimizer = SAM([p], rho=0.0, lr=1e-4, stochastic_rounding=True)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # A step of 1e-4 is 1/39 of bf16's gap below 1. The mean of 20,000 walks is known to 1.4e-4 at 5 sigma.
    assert float(p.detach().double().mean()) == pytest.approx(1 - 50e-4, abs=3e-4)


def test_a_step_under_grad_scaler_draws_twice(backend: str) -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, stochastic_rounding=True, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**4)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert int(optimizer.state_dict()["param_groups"][0]["rng_offset"]) == 6


# ---- the warning -------------------------------------------------------------------------------------------------


def test_the_warning_names_rho_and_the_rounding() -> None:
    params = weights([(100_000,)], torch.bfloat16)
    with pytest.warns(RoundingWarning, match=r"rho 0.05 over 100,000 weights is 1.6e-04 per weight, which about \d\d%"):
        SAM(params, rho=0.05, lr=0.1)


@pytest.mark.parametrize("options", [{"rho": 300.0}, {"rho": 0.05, "stochastic_rounding": True},
                                     {"rho": 0.05, "master_weights": True}, {"rho": 0.0}])  # fmt: skip
def test_no_warning_if_rounding_keeps_the_perturbation(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM(weights([(100_000,)], torch.bfloat16), lr=0.1, **options)
        SAM(weights([(100_000,)], torch.float32), rho=0.05, lr=0.1)
