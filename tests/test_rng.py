"""The specified random numbers are fair and independent, and stochastic rounding is unbiased.

All seeds are fixed, so that a test passes always or never. Bounds are 5 standard deviations of the measured number. A
fair generator would leave them once in two million tries.
"""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fused_sam.backends.contract import MASK, ROUND_PERTURBED, ROUND_UPDATED
from fused_sam.backends.rng import mask_of, random_words, round_stochastically, stream_key

N = 1 << 16
DEVIATIONS = 5.0
BF16, F16 = torch.bfloat16, torch.float16
SEED = 0x0123456789ABCDEF
FLAT = torch.zeros(N)


def uniform(key: tuple[int, int]) -> Tensor:
    """Return the stream's first numbers in [0, 1), in float64."""
    return random_words(key, FLAT).double() * 2.0**-32


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize("key", [(SEED, 0, 0, MASK), (0, 0, 0, 0), (SEED, 12345, 77, ROUND_UPDATED)])
def test_words_are_uniform(key: tuple[int, int, int, int]) -> None:
    x = uniform(stream_key(*key))
    assert abs(float(x.mean()) - 0.5) < DEVIATIONS * math.sqrt(1 / 12 / N)
    assert abs(float(x.var()) - 1 / 12) < DEVIATIONS * math.sqrt(1 / 180 / N)
    # With 256 bins, chi squared has 255 degrees of freedom and a standard deviation of sqrt(2 * 255).
    for shift in (24, 16, 8, 0):
        bins = torch.bincount((random_words(stream_key(*key), FLAT) >> shift) & 0xFF, minlength=256)
        chi = float((bins - N / 256).square().sum() / (N / 256))
        assert abs(chi - 255) < DEVIATIONS * math.sqrt(2 * 255), f"bits {shift} to {shift + 7}"


def test_neighbours_in_a_stream_are_independent() -> None:
    x = uniform(stream_key(SEED, 3, 4, MASK))
    for distance in (1, 2, 3, 16, 1024, 16384):
        assert abs(correlation(x[:-distance], x[distance:])) < DEVIATIONS / math.sqrt(N - distance)


def test_streams_are_independent() -> None:
    """The streams have neighbouring seeds, offsets, tensors and purposes, or seeds that differ in their upper half."""
    keys = [stream_key(SEED, 5, 6, MASK)]
    keys += [stream_key(SEED + d, 5, 6, MASK) for d in (1, 1 << 32, 1 << 63)]
    keys += [stream_key(SEED, 5 + d, 6, MASK) for d in (1, 2, 1 << 20)]
    keys += [stream_key(SEED, 5, 6 + d, MASK) for d in (1, 2, 1 << 30)]
    keys += [stream_key(SEED, 5, 6, purpose) for purpose in (ROUND_PERTURBED, ROUND_UPDATED)]
    streams = [uniform(key) for key in keys]
    for (i, a), (j, b) in itertools.combinations(enumerate(streams), 2):
        assert abs(correlation(a, b)) < DEVIATIONS / math.sqrt(N), f"streams {i} and {j}"
        # No stream is a shifted copy of another. A fair pair of N words each shares N * N / 2^32 = 1 word.
        shared = int(torch.isin(random_words(keys[i], FLAT), random_words(keys[j], FLAT)).sum())
        assert shared < 1 + DEVIATIONS * 2, f"streams {i} and {j} share {shared} words"


def test_keys_of_a_run_do_not_coincide() -> None:
    """30 offsets, 50 tensors and 3 purposes have 4,500 keys in 2^32. A fair hash lets 0.002 pairs coincide."""
    keys = {stream_key(SEED, d, s * 7919, p)[0] for d in range(0, 300, 10) for s in range(50) for p in range(3)}
    assert len(keys) >= 30 * 50 * 3 - 1


def test_numbers_depend_on_the_place_in_memory() -> None:
    key = stream_key(SEED, 1, 1, MASK)
    flat = random_words(key, torch.zeros(360))
    last = torch.zeros(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    assert torch.equal(random_words(key, last).permute(0, 2, 3, 1).reshape(-1), flat)
    turned = torch.zeros(20, 18).t()
    assert torch.equal(random_words(key, turned).t().reshape(-1), flat)
    assert torch.equal(random_words(key, torch.zeros(())), flat[0])


@pytest.mark.parametrize("prob", [0.5, 0.1, 0.9, 1.0, 2.0**-10])
def test_mask_has_its_share_of_elements(prob: float) -> None:
    count = int(mask_of(stream_key(SEED, 2, 9, MASK), FLAT, prob).sum())
    assert abs(count - prob * N) <= DEVIATIONS * math.sqrt(N * prob * (1 - prob))


def test_mask_and_rounding_are_independent() -> None:
    """The elements in the mask must not be those that are rounded up."""
    mask = mask_of(stream_key(SEED, 2, 9, MASK), FLAT, 0.5)
    for purpose in (ROUND_PERTURBED, ROUND_UPDATED):
        up = round_stochastically(FLAT + 1 + 2.0**-8, stream_key(SEED, 2, 9, purpose), BF16) > 1
        assert abs(correlation(mask.double(), up.double())) < DEVIATIONS / math.sqrt(N)


# ---- rounding ---------------------------------------------------------------------------------------------

FP16_SUBNORMAL = [0.3 * 2.0**-24, 1.7 * 2.0**-24, 5.25 * 2.0**-24, 600.75 * 2.0**-24, 1023.5 * 2.0**-24, 2.0**-40]
VALUES = {
    BF16: [1 + 2.0**-9, 3.1415927, 1e-3, 1e30, 1e-30, 2.0**-133 + 2.0**-136, 256.3],
    F16: [1 + 2.0**-12, 3.1415927, 1e-3, 2.0**-14 * 1.0003, 65503.9, 1000.37, *FP16_SUBNORMAL],
}


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the numbers of `dtype` below and above a positive x that it cannot represent."""
    near = torch.tensor(x, dtype=torch.float64).to(torch.float32).to(dtype)
    bits = int(near.view(torch.int16))
    low = bits if float(near) <= x else bits - 1
    pair = torch.tensor([low, low + 1], dtype=torch.int16).view(dtype).double()
    return float(pair[0]), float(pair[1])


@pytest.mark.parametrize(("dtype", "x"), [(d, x) for d, column in VALUES.items() for x in column])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_is_unbiased(dtype: torch.dtype, x: float, sign: float) -> None:
    numbers = torch.full((N,), sign * x)
    exact = float(numbers[0].abs())
    found = round_stochastically(numbers, stream_key(SEED, 4, 4, ROUND_PERTURBED), dtype).double() * sign
    low, high = neighbours(exact, dtype)
    assert set(found.tolist()) <= {low, high}
    share = (exact - low) / (high - low)
    # The unit is the gap between the two neighbours. 2^-13 is the resolution of fp16's 13 random bits.
    error = abs(float((found - low).mean()) / (high - low) - share)
    assert error < DEVIATIONS * math.sqrt(share * (1 - share) / N) + 2.0**-13


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_many_small_steps_add_up(dtype: torch.dtype) -> None:
    """Rounding to nearest would lose every step of a twentieth of an ulp. Stochastic rounding keeps their sum."""
    step = float(torch.finfo(dtype).eps) / 20
    x, nearest = torch.ones(4096, dtype=dtype), torch.ones(4096, dtype=dtype)
    for draw in range(100):
        x = round_stochastically(x.float() + step, stream_key(SEED, draw, 8, ROUND_UPDATED), dtype)
        nearest = (nearest.float() + step).to(dtype)
    assert torch.equal(nearest, torch.ones(4096, dtype=dtype))
    # Each step adds eps with probability 1/20. The variance is 100 * 1/20 * 19/20 in units of eps squared.
    bound = DEVIATIONS * math.sqrt(100 * 0.05 * 0.95 / 4096)
    assert abs(float((x.double() - 1).mean()) / float(torch.finfo(dtype).eps) - 5) < bound


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_representable_numbers_stay(dtype: torch.dtype) -> None:
    """Rounding keeps every representable number, subnormals and signed zeros included."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for draw in range(8):
        found = round_stochastically(every.float(), stream_key(SEED, draw, 2, ROUND_PERTURBED), dtype)
        wrong = found.view(torch.int16) != every.view(torch.int16)
        assert not wrong.any(), f"{every[wrong]} became {found[wrong]}"


@pytest.mark.parametrize("steps", [255, 256, 511, 1023])
def test_large_subnormals_of_fp16_stay_for_every_draw(steps: int) -> None:
    """fp32 must represent the sum of the number and the random fraction, or the number would be rounded up."""
    x = torch.full((N,), steps * 2.0**-24)
    for draw in range(4):
        assert torch.equal(round_stochastically(x, stream_key(SEED, draw, 2, ROUND_UPDATED), F16).float(), x)


def test_finite_numbers_within_fp16_stay_finite() -> None:
    x = torch.cat([torch.linspace(65472, 65504, N), torch.linspace(-65504, -65472, N)])
    for draw in range(4):
        found = round_stochastically(x, stream_key(SEED, draw, 3, ROUND_PERTURBED), F16)
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_not_finite_and_too_large_numbers_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    x = torch.cat([x, torch.tensor([65505.0, 65519.9, 65520.0, -1e6, 3e38])]) if dtype is F16 else x
    for draw in range(16):
        found = round_stochastically(x, stream_key(SEED, draw, 3, ROUND_UPDATED), dtype)
        torch.testing.assert_close(found, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_is_symmetric(dtype: torch.dtype) -> None:
    x = torch.randn(N) * 2.0 ** torch.randint(-26, 16, (N,))
    key = stream_key(SEED, 1, 1, ROUND_UPDATED)
    assert torch.equal(round_stochastically(-x, key, dtype), -round_stochastically(x, key, dtype))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_keeps_the_order(dtype: torch.dtype) -> None:
    """Rounding with one random word keeps the order of numbers, even where fp16's two formulas meet."""
    key = stream_key(SEED, 6, 6, ROUND_UPDATED)
    ladder = [2.0**-14 * (1 + i * 2.0**-13) for i in range(-64, 64)]
    columns = [round_stochastically(torch.full((256,), x), key, dtype).double() for x in ladder]
    assert all(bool((a <= b).all()) for a, b in pairwise(columns))
