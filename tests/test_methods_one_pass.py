"""AsyncSAM, RandomSAM and FlatLoRA: their formulas in float64, and what displaced weights need of every loop."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support import nets
from support.bits import assert_same_bits, same_bits
from support.family import STEPS, Problem, Vector, assert_weights, built, model_and_groups, options, sam_steps, train
from torch import Tensor, nn

import fused_sam
from fused_sam import SAM
from fused_sam.backends.contract import NOISE
from fused_sam.backends.rng import fill_normal, normal_of, random_words, stream_key
from fused_sam.schedule import AdaptiveSchedule, Every

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
# Streams of random numbers are numbered in the order in which the groups list the parameters.
STREAM = [[0, 2, 1, 3, 4, 5].index(i) for i in range(6)]


def normal(p: Tensor, seed: int, step: int, i: int) -> Tensor:
    """Return the specified numbers in float64."""
    return normal_of(random_words(stream_key(seed, step, i, NOISE), p), torch.float64)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 4, 5, 2), (70_001,)])
def test_the_fast_form_draws_the_specified_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout is torch.channels_last and len(shape) != 4:
            continue
        drawn = torch.empty(shape, dtype=dtype).to(memory_format=layout)
        key = stream_key(2**63 + 12345, 7, 3, NOISE)
        fill_normal(key, drawn)
        assert_same_bits([drawn], [normal_of(random_words(key, drawn), dtype)])


def test_numbers_beyond_2_to_the_32_have_other_words() -> None:
    """The fast form takes the upper word of the place into the key as the specification does."""
    from fused_sam.backends import rng

    places = torch.arange(2**32 - 4, 2**32 + 4)
    key = stream_key(5, 1, 2, NOISE)
    expected = rng.words_at(key, places)
    a, b = key[0] + 2**32, key[1] + 0x9E3779B9
    first = torch.arange(4, dtype=torch.int32)
    words = rng._mix_int32_(rng._mix_int32_(first + rng._signed(a)) ^ rng._signed(b))
    assert torch.equal(words.long() & 0xFFFFFFFF, expected[4:])


def test_the_numbers_are_normal() -> None:
    x = torch.empty(200_000, dtype=torch.float64)
    fill_normal(stream_key(0, 1, 0, NOISE), x)
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5 and abs(x.square().mean() - 1) < 5 * (2 / n) ** 0.5  # five standard errors
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5 and abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4 < x.abs().max() < 5.4
    for limit in (-1.0, 0.0, 2.0):
        share = 0.5 * (1 + math.erf(limit / 2**0.5))
        assert abs((x < limit).double().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    y = torch.empty_like(x)
    for other in ((0, 2, 0), (0, 1, 1), (1, 1, 0)):  # of another step, parameter and seed
        fill_normal(stream_key(*other, NOISE), y)
        assert abs((x * y).mean()) < 5 / n**0.5


# ---- the formulas ---------------------------------------------------------------------------------------------------


@DTYPES
def test_async_sam(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2503.11147 with a staleness of one step: e = rho g' / ||g'||, g' the gradient of the last update."""
    model, groups = model_and_groups(dtype)
    passes: list[int] = []
    optimizer = fused_sam.AsyncSAM(groups, backend=backend, **options())
    sam_steps(model, optimizer, count=passes)
    assert len(passes) == STEPS
    p, last = Problem(), None
    for step in range(STEPS):
        last = p.gradient(p.w if last is None else p.perturb(last), step)
        p.update(last)
    assert last is not None
    assert_weights(model, p.perturb(last))
    optimizer.eval()
    assert_weights(model, p.w)


@DTYPES
def test_random_sam(backend: str, dtype: torch.dtype) -> None:
    """e = rho n / ||n||, n from the specified random numbers (backends/rng.py)."""
    model, groups = model_and_groups(dtype)
    passes: list[int] = []
    optimizer = fused_sam.RandomSAM(groups, seed=11, backend=backend, **options())
    sam_steps(model, optimizer, count=passes)
    assert len(passes) == STEPS
    p = Problem()

    def noise(step: int) -> Vector:
        return [normal(w, 11, step, i) for w, i in zip(p.w, STREAM, strict=True)]

    for step in range(STEPS):
        p.update(p.gradient(p.perturb(noise(step)) if step else p.w, step))
    assert_weights(model, p.perturb(noise(STEPS)))
    optimizer.eval()
    assert_weights(model, p.w)


class Adapted(nn.Module):
    """A net of two frozen layers, one of them a convolution, each with a trainable adapter; and a trainable head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 4, 3).to(dtype).requires_grad_(False)
        self.base = nn.Linear(16, 8).to(dtype).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 16).to(dtype))
        self.b = nn.Parameter(torch.zeros(8, 2, dtype=dtype))
        self.head = nn.Linear(8, 3).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.unsqueeze(1))).flatten(1)
        return self.head(torch.tanh(self.base(h) + h @ self.a.T @ self.b.T))


@DTYPES
def test_flat_lora(backend: str, dtype: torch.dtype) -> None:
    """arXiv 2409.14396: N(0, (rho_t ||row|| / sqrt(n))^2) on frozen weights, rho_t a cosine; adapters by AdamW."""
    model, twin = Adapted(dtype), Adapted(torch.float64)
    twin.load_state_dict(model.state_dict())
    own = {"lr": 0.02, "weight_decay": 0.1}

    def groups_of(m: Adapted) -> list[dict[str, Any]]:
        return [
            {"params": [m.base.weight, m.a, m.b, m.base.bias], "rho": 0.6},
            {"params": [*m.conv.parameters(), *m.head.parameters()], "lr": 0.05},
        ]

    optimizer = fused_sam.FlatLoRA(
        groups_of(model), torch.optim.AdamW, total=6, rho=0.3, seed=4, backend=backend, **own
    )
    trained = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups_of(twin)]
    base = torch.optim.AdamW([{k: v for k, v in g.items() if k != "rho"} for g in trained], foreach=False, **own)
    frozen = {"base": (twin.base.weight, 0, 0.6), "conv": (twin.conv.weight, 4, 0.3)}
    start = copy.deepcopy(dict(model.named_parameters()))
    moved = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        nets.closure_for(model, step)()
        optimizer.step()
        clean = {name: w.detach().clone() for name, (w, *_) in frozen.items()}
        with torch.no_grad():
            for w, i, rho in frozen.values():
                rows = w.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1))
                growth = (1 - math.cos(math.pi * min(1.0, step / 6))) / 2
                noise = rho * growth * rows / math.sqrt(w[0].numel()) * normal(w, 4, step, i)
                w += noise
                moved = max(moved, float(noise.abs().max()))
        base.zero_grad()
        nets.closure_for(twin, step)()
        with torch.no_grad():
            for name, (w, *_) in frozen.items():
                w.copy_(clean[name])
        base.step()
    assert moved > 0.1
    frozen_now = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    displaced = {name for name, p in frozen_now if not torch.equal(p, start[name])}
    assert displaced == {"base.weight", "conv.weight"}
    optimizer.eval()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not p.requires_grad:
            assert same_bits(p, start[name]), name
        # Adam divides by small roots: fp32 errors of ten steps grow to 1e-5 of weights of size 1.
        torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-11 if dtype is torch.float64 else 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
def test_flat_lora_restores_low_precision_weights_bit_for_bit(backend: str, dtype: torch.dtype, masters: bool) -> None:
    w = nn.Parameter(torch.randn(33, 65).to(dtype), requires_grad=False)
    p = nn.Parameter(torch.ones(3, dtype=dtype if masters else torch.float32))
    optimizer = fused_sam.FlatLoRA([w, p], total=1, rho=0.5, lr=0.1, master_weights=masters, backend=backend)
    before = w.detach().clone()
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        relative = (w - before).float().norm() / before.float().norm()
        assert 0.45 < relative < 0.55  # rho, but for the spread of 2,145 numbers
    optimizer.eval()
    assert_same_bits([w], [before])


# ---- displaced and clean weights ------------------------------------------------------------------------------------

METHODS = ["AsyncSAM", "RandomSAM", "FlatLoRA"]


def weights(optimizer: SAM) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("method", METHODS)
def test_displaced_weights_are_refused_and_restored_bit_for_bit(backend: str, method: str) -> None:
    model, optimizer = built(method, backend)
    assert not optimizer.displaced and not optimizer.needs_second_pass
    optimizer.train()
    assert not optimizer.displaced, "the first step is the base optimizer's"
    train(model, optimizer, range(2))
    assert optimizer.displaced and not optimizer.perturbed
    stored = [p.detach().clone() for p in weights(optimizer)]
    for attempt in (optimizer.state_dict, lambda: copy.deepcopy(optimizer), lambda: pickle.dumps(optimizer)):
        with pytest.raises(RuntimeError, match=r"while the weights are displaced .*call optimizer.eval\(\) first"):
            attempt()
    with optimizer.unperturbed():
        inside = [p.detach().clone() for p in weights(optimizer)]
    assert_same_bits(weights(optimizer), stored)
    optimizer.restore()
    assert_same_bits(weights(optimizer), stored)
    optimizer.eval()
    assert_same_bits(weights(optimizer), inside)
    nets.loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match=rf"not those of {method}: call optimizer.train\(\)"):
        optimizer.step()
    assert_same_bits(weights(optimizer), inside)
    optimizer.train()
    assert_same_bits(weights(optimizer), stored)
    for call in (optimizer.first_step, optimizer.second_step):
        with pytest.raises(RuntimeError, match=f"{method} takes one pass"):
            call()


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_leaves_weights_clean(backend: str, method: str) -> None:
    model, optimizer = built(method, backend, schedule=Every(2))
    displaced = []
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        displaced.append(optimizer.displaced)
    assert displaced == [False, True, False, True, False]
    with pytest.raises(ValueError, match=f"{method} displaces before there are gradients"):
        built(method, backend, schedule=AdaptiveSchedule(10))


@pytest.mark.parametrize("method", METHODS)
def test_clean_between_steps_takes_the_same_steps(backend: str, method: str) -> None:
    (model, optimizer), (twin, other) = built(method, backend), built(method, backend)
    other.clean_between_steps = True
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        other.train()
        train(twin, other, range(step, step + 1))
        assert not other.displaced
    optimizer.eval()
    assert_same_bits(weights(optimizer), weights(other))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_backends_displace_equally(backend: str, method: str, dtype: torch.dtype) -> None:
    """bf16 weights have fp32 vectors; one of them has gaps in memory, one another layout, and one is empty."""

    def train(name: str) -> list[Tensor]:
        torch.manual_seed(0)
        params: list[Any] = [
            nn.Parameter(torch.randn(5, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(7, 8).to(dtype)[:, ::2]),
            nn.Parameter(torch.zeros(0, dtype=dtype)),
            nn.Parameter(torch.randn(4, 9).to(dtype), requires_grad=False),
        ]
        own = {"total": 2} if method == "FlatLoRA" else {}
        optimizer = fused_sam.METHODS[method](params, rho=0.5, lr=0.1, momentum=0.9, backend=name, **own)
        for step in range(4):
            for i, p in enumerate(params[:3]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(dtype)
            optimizer.step()
        return params

    for p, q in zip(train(backend), train("reference"), strict=True):
        # fp32 sums in another order; bf16 rounds displaced weights of size 2 to steps of 2^-7.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 if dtype is torch.float32 else 2**-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_optimizer_with_modes_of_its_own_is_an_error(method: str) -> None:
    class WithModes(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    own = {"total": 5} if method == "FlatLoRA" else {}
    with pytest.raises(TypeError, match=f"WithModes has train.* which {method} needs"):
        fused_sam.METHODS[method]([nn.Parameter(torch.ones(2)), frozen], WithModes, lr=0.1, **own)


@pytest.mark.parametrize("method", ["AsyncSAM", "RandomSAM"])
def test_groups_with_scaled_and_unscaled_weights(backend: str, method: str) -> None:
    """A subclass whose is_scaled leaves biases out, as ASAM's does, has twins of its groups."""

    class Scaled(fused_sam.METHODS[method]):  # type: ignore[misc]
        def is_scaled(self, param: Tensor) -> bool:
            return param.dim() > 1

    w, b = nn.Parameter(torch.full((1, 2), 3.0)), nn.Parameter(torch.full((2,), 5.0))
    optimizer = Scaled([w, b], rho=1.0, adaptive=True, eta=1.0, lr=0.0, backend=backend)
    for p in (w, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    v = [torch.ones(1, 2), torch.ones(2)] if method == "AsyncSAM" else [normal(w, 0, 1, 0), normal(b, 0, 1, 1)]
    scaled = [4 * v[0].double(), v[1].double()]
    length = math.sqrt(sum(float(x.square().sum()) for x in scaled))
    torch.testing.assert_close(w.detach().double(), 3 + 4 * scaled[0] / length, rtol=0, atol=1e-6)
    torch.testing.assert_close(b.detach().double(), 5 + scaled[1] / length, rtol=0, atol=1e-6)


def test_async_sam_keeps_its_direction_over_a_skipped_step(backend: str) -> None:
    model, optimizer = built("AsyncSAM", backend)
    train(model, optimizer, range(3))
    stored = [p.detach().clone() for p in weights(optimizer)]
    optimizer.zero_grad()
    nets.loss_of(model, 3).backward()
    next(model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped
    assert_same_bits(weights(optimizer), stored)


@pytest.mark.parametrize("method", ["RandomSAM", "FlatLoRA"])
def test_seeds_and_steps_draw_other_numbers(method: str) -> None:
    def displaced(seed: int, steps: int) -> Tensor:
        model, optimizer = built(method, "reference", seed=seed)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, range(steps))
        stored = torch.cat([p.detach().flatten() for p in weights(optimizer)])
        optimizer.eval()
        return stored - torch.cat([p.detach().flatten() for p in weights(optimizer)])

    first = displaced(0, 8)
    assert torch.equal(first, displaced(0, 8))
    for other in (displaced(1, 8), displaced(0, 9)):
        cosine = float(first @ other / (first.norm() * other.norm()))
        assert abs(cosine) < 0.7  # 35 numbers at least: three standard deviations are 0.5


# ---- errors of FlatLoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen",
    [
        [],
        [{"params": [nn.Parameter(torch.ones(3), requires_grad=False)]}],  # a bias
        [{"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)]}],
        [{"params": [nn.Parameter(torch.ones(2, 2), requires_grad=False)], "perturb": False}],
    ],
    ids=["none", "a bias", "quantised", "perturb=False"],
)
def test_flat_lora_without_frozen_weights_is_an_error(frozen: list[dict[str, Any]]) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="FlatLoRA adds noise to frozen weights, and there are none"):
        fused_sam.FlatLoRA([{"params": [p]}, *frozen], torch.optim.AdamW, total=5, lr=0.1)
    assert torch.equal(p, torch.ones(3, 3))


def test_flat_lora_refuses_adaptive_groups() -> None:
    p, w = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    with pytest.raises(ValueError, match="group 0 has adaptive=True"):
        fused_sam.FlatLoRA([p, w], total=5, lr=0.1, adaptive=True)
    with pytest.raises(TypeError, match="FlatLoRA needs the option total"):
        fused_sam.FlatLoRA([p, w], lr=0.1)


def test_flat_lora_whose_last_frozen_weight_was_unfrozen_is_an_error_and_changes_nothing(backend: str) -> None:
    p, w = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = fused_sam.FlatLoRA([p, w], total=2, rho=0.5, lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    optimizer.step()
    w.requires_grad_(True)
    before = [x.detach().clone() for x in (p, w)]
    with pytest.raises(RuntimeError, match="no frozen weight left"):
        optimizer.step()
    assert_same_bits([p, w], before)
    optimizer.eval()
    assert torch.equal(w, torch.ones(2, 2))
