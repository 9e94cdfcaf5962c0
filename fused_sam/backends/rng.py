"""Random numbers that are a function of where they are used, and rounding at random: what csrc/core/rng.h implements.

Number i of a stream is a hash of i and of the stream's key, which the seed, the count of draws, the tensor and the
purpose make up. Nothing is stored, threads share nothing, and every backend draws the same numbers. The mixing function
is the 32-bit one that C. Wellons found by search ("Prospecting for hash functions", 2018), applied once before and once
after the key's second half is mixed in.

torch has no unsigned 32-bit arithmetic on every device: words are int64 numbers from 0 to 2^32 - 1 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def stream_key(seed: int, draw: int, stream: int, purpose: int) -> tuple[int, int]:
    """The two words of a stream's key."""
    low, high = seed & _WORD, (seed >> 32) & _WORD

    def mixed(x: int) -> int:
        return int(mix(torch.tensor(x & _WORD)))

    a = mixed(mixed(low + draw * 0x9E3779B9) + stream * 0x85EBCA6B + purpose * 0xC2B2AE35)
    b = mixed(mixed(high ^ a) + 0x27D4EB2F)
    return a, b


def random_words(key: tuple[int, int], like: Tensor) -> Tensor:
    """One word for each element of `like`, in the order in which they lie in memory: int64, 0 to 2^32 - 1."""
    a, b = key
    i = _positions(like)
    return mix(mix((i + a) & _WORD) ^ ((b + (i >> 32) * 0x9E3779B9) & _WORD))


def _positions(t: Tensor) -> Tensor:
    """Each element's number in memory order, for a dense tensor: its offset."""
    offsets = torch.zeros((), dtype=torch.int64, device=t.device)
    for dim, (size, stride) in enumerate(zip(t.shape, _dense_strides(t), strict=True)):
        shape = [1] * t.dim()
        shape[dim] = size
        offsets = offsets + stride * torch.arange(size, device=t.device).view(shape)
    return offsets


def _dense_strides(t: Tensor) -> tuple[int, ...]:
    """The strides of a tensor that has t's order in memory, and no gaps."""
    return torch.empty_like(t, memory_format=torch.preserve_format, device="meta").stride()


def mask_of(key: tuple[int, int], like: Tensor, mask_prob: float) -> Tensor:
    """Return a bool tensor of the shape of `like`, True with probability `mask_prob`, in steps of 2^-24."""
    prob32 = torch.tensor(mask_prob, dtype=torch.float32, device=like.device)
    return (random_words(key, like) >> 8).to(torch.float32) * 2.0**-24 < prob32


def round_stochastically(x: Tensor, key: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """fp32 to bf16 or fp16: up or down with probabilities that make the mean x. What is not finite, or lies beyond
    fp16's largest number, is rounded to nearest.
    """
    r = random_words(key, x)
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _WORD
    if dtype is torch.bfloat16:
        down = (bits + (r & 0xFFFF)) & 0xFFFF0000
        return torch.where(x.isfinite(), _floats(down), x).to(dtype)  # exact: the low bits are 0
    magnitude = bits & 0x7FFFFFFF
    normal = _floats((magnitude + (r & 0x1FFF)) & 0x7FFFE000)
    # Below 2^-14 numbers are 2^-24 apart; 10 bits for their count leave 14 of a float's 24 to the random part.
    steps = _floats(magnitude) * 2.0**24 + (r & 0x3FFF).to(torch.float32) * 2.0**-14
    rounded = torch.where(magnitude >= 0x38800000, normal, steps.floor() * 2.0**-24)
    rounded = torch.where(magnitude < 0x477FE000, rounded, x.abs())
    return torch.where(bits >> 31 != 0, -rounded, rounded).to(dtype)


def _floats(bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return signed.contiguous().view(torch.float32)
