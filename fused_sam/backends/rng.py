"""Random numbers that are a function of where they are used, and rounding at random: what csrc/core/rng.h implements.

Number i of a stream is a hash of i and of the stream's key, which the seed, the count of draws, the tensor and the
purpose make up. Nothing is stored, threads share nothing, and every backend draws the same numbers. The mixing function
is the 32-bit one that C. Wellons found by search ("Prospecting for hash functions", 2018), applied once before and once
after the key's second half is mixed in.

torch has no unsigned 32-bit arithmetic on every device: words are int64 numbers from 0 to 2^32 - 1 here. Normal numbers
are drawn by torch alone, so they have a faster form of the same words, in int32 with its wrap-around.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # numbers drawn at a time on the CPU, so that they stay in its cache; a power of two
_Word = TypeVar("_Word", int, Tensor)


def mix(x: _Word) -> _Word:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def stream_key(seed: int, draw: int, stream: int, purpose: int) -> tuple[int, int]:
    """The two words of a stream's key."""
    low, high = seed & _WORD, (seed >> 32) & _WORD

    def mixed(x: int) -> int:
        return mix(x & _WORD)

    a = mixed(mixed(low + draw * 0x9E3779B9) + stream * 0x85EBCA6B + purpose * 0xC2B2AE35)
    b = mixed(mixed(high ^ a) + 0x27D4EB2F)
    return a, b


def random_words(key: tuple[int, int], like: Tensor) -> Tensor:
    """One word for each element of `like`, in the order in which they lie in memory: int64, 0 to 2^32 - 1."""
    return words_at(key, _positions(like))


def words_at(key: tuple[int, int], i: Tensor) -> Tensor:
    """The words of these numbers: int64, 0 to 2^32 - 1."""
    a, b = key
    return mix(mix((i + a) & _WORD) ^ ((b + (i >> 32) * 0x9E3779B9) & _WORD))


def normal_of(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a standard normal number for each word, from its upper 23 bits: never beyond 5.3 in size."""
    odd = (words >> 9).to(dtype) * 2.0**-22 + (2.0**-23 - 1)  # 2 u - 1 for u in the middle of one of 2^23 steps, exact
    return torch.erfinv(odd) * math.sqrt(2)


def fill_normal(key: tuple[int, int], out: Tensor) -> None:
    """Write number i of the stream, as a standard normal number, to the element at place i of a dense tensor's memory.

    The same numbers as normal_of(random_words(key, out), out.dtype).
    """
    flat = out.as_strided((out.numel(),), (1,))
    chunk = _CHUNK if out.device.type == "cpu" else 1 << 26
    first = torch.arange(min(chunk, flat.numel()), dtype=torch.int32, device=out.device)
    for start in range(0, flat.numel(), chunk):  # no chunk crosses a multiple of 2^32
        part = flat[start : start + chunk]
        a, b = key[0] + start, key[1] + (start >> 32) * 0x9E3779B9
        words = _mix_int32_(_mix_int32_(first[: part.numel()] + _signed(a)) ^ _signed(b))
        high = words.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
        torch.erfinv(part.copy_(high).mul_(2.0**-22).add_(2.0**-23 - 1), out=part)
        part.mul_(math.sqrt(2))


def _mix_int32_(x: Tensor) -> Tensor:
    """As `mix`, in place in the 32 bits of an int32 tensor, whose products wrap around."""
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))  # the shift repeats the sign
        if factor:
            x.mul_(_signed(factor))
    return x


def _signed(word: int) -> int:
    """Return the int32 with the bits of a word."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


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
