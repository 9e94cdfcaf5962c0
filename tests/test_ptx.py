# ruff: noqa: E501  # instructions are not broken
"""The interpreter of PTX itself (support/ptx): its arithmetic, its order of execution, and what it reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.ptx import Options, PtxError, Region, UnknownOpcodeError, kernels_of, launch

REGISTERS = """
    .reg .pred %p<9>;  .reg .b16 %rs<9>;  .reg .b32 %r<19>;  .reg .f32 %f<9>;  .reg .b64 %rd<19>;
"""
# Leaves the thread's number in the grid in %r0, and the address of its 8 bytes of each of three arrays in %rd0 to %rd2.
START = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r0, %tid.x;
    mad.lo.s32 %r0, %r1, %r2, %r0;
    mul.wide.u32 %rd3, %r0, 8;
    ld.param.u64 %rd0, [k_param_0];
    ld.param.u64 %rd1, [k_param_1];
    ld.param.u64 %rd2, [k_param_2];
    add.s64 %rd0, %rd0, %rd3;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
"""
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"


def module(body: str, *, start: str = START, outside: str = "", directives: str = "") -> str:
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(3))
    return f"{HEAD}{outside}.visible .entry k({parameters})\n{directives}\n{{{REGISTERS}{start}{body}\nret;\n}}"


def run(
    body: str, *arrays: np.ndarray[Any, Any], grid: int = 1, threads: int = 32, shared: int = 0, **how: Any
) -> None:
    """Run a kernel on up to three arrays, which it may change."""
    options = Options(**{k: how.pop(k) for k in ("seed", "races", "delays", "lanes") if k in how})
    (kernel,) = kernels_of(module(body, **how)).values()
    arrays = (*arrays, np.zeros(1), np.zeros(1), np.zeros(1))[:3]
    regions = [Region(a.ctypes.data, a.nbytes, f"array {i}") for i, a in enumerate(arrays)]
    addresses = np.array([a.ctypes.data for a in arrays], np.uint64).tobytes()
    launch(kernel, grid, threads, addresses, regions, shared=shared, options=options)


def applied(body: str, a: Any, b: Any = 0, threads: int = 32) -> np.ndarray[Any, Any]:
    """Run a body on %rd6 (also as %r6 and %f6) and %rd7 (%r7, %f7); return what it leaves in %rd8."""
    inputs = [np.resize(np.asarray(x), -(-threads // 256) * 256).astype(np.int64).view(np.uint64) for x in (a, b)]
    out = np.zeros(len(inputs[0]), np.uint64)
    loads = """
        ld.global.u64 %rd6, [%rd0];  ld.global.u64 %rd7, [%rd1];
        cvt.u32.u64 %r6, %rd6;  cvt.u32.u64 %r7, %rd7;  mov.b32 %f6, %r6;  mov.b32 %f7, %r7;  mov.u64 %rd8, 0;
    """
    run(f"{loads}{body}\nst.global.u64 [%rd2], %rd8;", *inputs, out, grid=len(out) // 256, threads=256)
    return out[:threads]


def bits(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def floats(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.astype(np.uint32).view(np.float32)


# ---- arithmetic -----------------------------------------------------------------------------------------------------

M32 = 0xFFFFFFFF
WORDS = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0x00FF00FF]


def signed(x: int, size: int = 32) -> int:
    return x - (1 << size) if x >> (size - 1) & 1 else x


def field(a: int, start: int, count: int, *, sign: bool) -> int:
    wide = signed(a) if sign else a
    x = wide >> start & ((1 << count) - 1)
    return (signed(x, count) if sign and count else x) & M32


INTEGERS = {
    "add.s32 %r8, %r6, %r7": lambda a, b: a + b,
    "sub.s32 %r8, %r6, %r7": lambda a, b: a - b,
    "mul.lo.s32 %r8, %r6, %r7": lambda a, b: a * b,
    "mul.lo.s32 %r8, %r6, -1640531527": lambda a, b: a * -1640531527,
    "mul.hi.u32 %r8, %r6, %r7": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r8, %r6, %r7": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r8, %r6, %r7, 5": lambda a, b: a * b + 5,
    "neg.s32 %r8, %r6": lambda a, b: -a,
    "not.b32 %r8, %r6": lambda a, b: ~a,
    "and.b32 %r8, %r6, %r7": lambda a, b: a & b,
    "or.b32 %r8, %r6, %r7": lambda a, b: a | b,
    "xor.b32 %r8, %r6, %r7": lambda a, b: a ^ b,
    "min.s32 %r8, %r6, %r7": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r8, %r6, %r7": lambda a, b: max(a, b),
    "abs.s32 %r8, %r6": lambda a, b: abs(signed(a)),
    "shl.b32 %r8, %r6, %r7": lambda a, b: a << min(b, 32),
    "shl.b32 %r8, %r6, 7": lambda a, b: a << 7,
    "shr.u32 %r8, %r6, %r7": lambda a, b: a >> min(b, 32),
    "shr.s32 %r8, %r6, %r7": lambda a, b: signed(a) >> min(b, 32),
    "bfe.u32 %r8, %r6, 4, 7": lambda a, b: field(a, 4, 7, sign=False),
    "bfe.s32 %r8, %r6, 28, 7": lambda a, b: field(a, 28, 7, sign=True),
    "bfe.s32 %r8, %r6, 2, 1": lambda a, b: field(a, 2, 1, sign=True),
    "bfi.b32 %r8, %r6, %r7, 8, 12": lambda a, b: b & ~0xFFF00 | (a & 0xFFF) << 8,
    "lop3.b32 %r8, %r6, %r7, 0x0F0F0F0F, 0x96": lambda a, b: a ^ b ^ 0x0F0F0F0F,
    "lop3.b32 %r8, %r6, %r7, 0x0F0F0F0F, 0xCA": lambda a, b: a & b | ~a & 0x0F0F0F0F,
    "prmt.b32 %r8, %r6, %r7, 0x7610": lambda a, b: a & 0xFFFF | b & 0xFFFF0000,
    "prmt.b32 %r8, %r6, %r7, 0x8885": lambda a, b: (b >> 8 & 0xFF) | (0xFFFFFF00 if a & 0x80 else 0),
    "shf.l.wrap.b32 %r8, %r6, %r7, 8": lambda a, b: b << 8 | a >> 24,
    "shf.r.wrap.b32 %r8, %r6, %r7, 40": lambda a, b: ((b << 32 | a) >> 8),
    "popc.b32 %r8, %r6": lambda a, b: bin(a).count("1"),
    "clz.b32 %r8, %r6": lambda a, b: 32 - a.bit_length(),
    "setp.lt.s32 %p1, %r6, %r7; selp.b32 %r8, 5, %r6, %p1": lambda a, b: 5 if signed(a) < signed(b) else a,
    "setp.hi.u32 %p1, %r6, %r7; selp.b32 %r8, 5, %r6, %p1": lambda a, b: 5 if a > b else a,
    "setp.eq.b32 %p1|%p2, %r6, %r7; selp.b32 %r8, 5, 6, %p2": lambda a, b: 6 if a == b else 5,
    "setp.ne.s32 %p1, %r6, 0; setp.lt.and.u32 %p2, %r6, %r7, %p1; selp.b32 %r8, 1, 0, %p2": lambda a, b: 0 < a < b,
    "setp.ne.s32 %p1, %r6, 0; setp.lt.or.u32 %p2, %r6, %r7, !%p1; selp.b32 %r8, 1, 0, %p2": lambda a, b: not a or a < b,
    "setp.lt.u32 %p1, %r6, %r7; not.pred %p2, %p1; selp.b32 %r8, 1, 0, %p2": lambda a, b: a >= b,
    "mov.b32 {%rs1, %rs2}, %r6; mov.b32 %r8, {%rs2, %rs1}": lambda a, b: a << 16 | a >> 16,
    "mov.b64 {_, %r8}, %rd6": lambda a, b: 0,
    "cvt.u16.u32 %rs1, %r6; cvt.s32.s16 %r8, %rs1": lambda a, b: signed(a & 0xFFFF, 16),
    "cvt.u16.u32 %rs1, %r6; cvt.u32.u16 %r8, %rs1": lambda a, b: a & 0xFFFF,
    "abs.f16x2 %r8, %r6": lambda a, b: a & 0x7FFF7FFF,
    "neg.bf16x2 %r8, %r6": lambda a, b: a ^ 0x80008000,
}  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text: str) -> None:
    pairs = [(a, b) for a in WORDS for b in WORDS]
    found = applied(f"{text}; cvt.u64.u32 %rd8, %r8;", *zip(*pairs, strict=True), threads=len(pairs))
    assert found.tolist() == [int(INTEGERS[text](a, b)) & M32 for a, b in pairs]


WIDE = {
    "mul.wide.u32 %rd8, %r6, %r7": lambda a, b: a * b,
    "mul.wide.s32 %rd8, %r6, %r7": lambda a, b: signed(a) * signed(b),
    "mad.wide.s32 %rd8, %r6, 8, %rd7": lambda a, b: signed(a) * 8 + b,
    "cvt.s64.s32 %rd8, %r6": lambda a, b: signed(a),
    "add.s64 %rd8, %rd6, -24": lambda a, b: a - 24,
    "shl.b64 %rd8, %rd6, %r7": lambda a, b: a << min(b, 64),
    "mov.b64 %rd8, {%r6, %r7}": lambda a, b: a | b << 32,
    "min.s64 %rd8, %rd6, 2048": lambda a, b: min(a, 2048),
    "div.u64 %rd8, %rd6, 7": lambda a, b: a // 7,
    "sub.s64 %rd8, 0, %rd6; div.s64 %rd8, %rd8, 7": lambda a, b: -(a // 7),
    "sub.s64 %rd8, 0, %rd6; rem.s64 %rd8, %rd8, 7": lambda a, b: -(a % 7),
}


@pytest.mark.parametrize("text", WIDE)
def test_integers_of_64_bits(text: str) -> None:
    pairs = [(a, b) for a in WORDS for b in WORDS]
    found = applied(f"{text};", *zip(*pairs, strict=True), threads=len(pairs))
    assert found.tolist() == [WIDE[text](a, b) & (1 << 64) - 1 for a, b in pairs]


NUMBERS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.0, 1e-40, -1e-45, 1e38, -3.4e38, np.inf, -np.inf, np.nan, 1 + 2**-23, 0.1], "f4"
)
FLOATS = {
    "add.f32 %f8, %f6, %f7": np.add,
    "add.rn.f32 %f8, %f6, %f7": np.add,
    "sub.f32 %f8, %f6, %f7": np.subtract,
    "mul.f32 %f8, %f6, 0f40490FDB": lambda a, b: a * np.float32(np.pi),
    "div.rn.f32 %f8, %f6, %f7": np.divide,
    "sqrt.rn.f32 %f8, %f6": lambda a, b: np.sqrt(a),
    "neg.f32 %f8, %f6": lambda a, b: -a,
    "abs.f32 %f8, %f6": lambda a, b: np.abs(a),
    "max.f32 %f8, %f6, %f7": lambda a, b: np.where((a == 0) & (b == 0), a + b, np.fmax(a, b)),  # 0 is above -0
    "min.NaN.f32 %f8, %f6, %f7": lambda a, b: np.where((a == 0) & (b == 0), -(-a - b), np.minimum(a, b)),
    "setp.lt.f32 %p1, %f6, %f7; selp.f32 %f8, %f6, %f7, %p1": lambda a, b: np.where(a < b, a, b),
    "setp.ltu.f32 %p1, %f6, %f7; selp.f32 %f8, 0f3F800000, 0f00000000, %p1": lambda a, b: ~(a >= b) * 1.0,
    "setp.ne.f32 %p1, %f6, %f7; selp.f32 %f8, 0f3F800000, 0f00000000, %p1": lambda a, b: ((a < b) | (a > b)) * 1.0,
    "setp.neu.f32 %p1, %f6, %f7; selp.f32 %f8, 0f3F800000, 0f00000000, %p1": lambda a, b: (a != b) * 1.0,
    "setp.nan.f32 %p1, %f6, %f6; selp.f32 %f8, 0f3F800000, %f7, %p1": lambda a, b: np.where(np.isnan(a), 1, b),
    "cvt.rmi.f32.f32 %f8, %f6": lambda a, b: np.floor(a),
    "cvt.rni.f32.f32 %f8, %f6": lambda a, b: np.rint(a),
    "cvt.rmi.ftz.f32.f32 %f8, %f6": lambda a, b: np.floor(np.where(np.abs(a) < 2.0**-126, np.copysign(0, a), a)),
}  # fmt: skip


@pytest.mark.parametrize("text", FLOATS)
def test_fp32(text: str) -> None:
    a, b = (x.ravel() for x in np.meshgrid(NUMBERS, NUMBERS))
    found = floats(applied(f"{text}; mov.b32 %r8, %f8; cvt.u64.u32 %rd8, %r8;", bits(a), bits(b), threads=len(a)))
    with np.errstate(all="ignore"):
        wanted = np.asarray(FLOATS[text](a, b), np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found) | np.isnan(found), np.signbit(wanted) | np.isnan(wanted))


def test_fma_rounds_once() -> None:
    """Where the product's last bit decides between two neighbours, and where the result is subnormal."""
    rng = np.random.default_rng(0)
    a, b = ((1 + rng.integers(0, 2**23, 4000) * 2.0**-23).astype("f4") for _ in range(2))
    c = (-(a.astype("f8") * b) * (1 + rng.choice([0, 2.0**-24, -(2.0**-24), 2.0**-30, 1], 4000))).astype("f4")
    # 1 + 2^-12 times itself is 1 + 2^-11 + 2^-24: half a unit of the last place of c, and a small part of it more or less.
    a = np.append(a, np.array([1 + 2**-12, 1 + 2**-12, 2.0**-100, 2.0**-75, -3.0, np.inf], "f4"))
    b = np.append(b, np.array([2**-24 + 2**-36, 1 + 2**-12, 1.5 * 2.0**-40, 2.0**-75, 0.0, 0.0], "f4"))
    c = np.append(c, np.array([1.0, 2**-30, 2.0**-149, 2.0**-149, -0.0, 1.0], "f4"))
    body = """
        ld.global.u64 %rd6, [%rd0];  mov.b64 {%r6, %r7}, %rd6;  mov.b32 %f6, %r6;  mov.b32 %f7, %r7;
        ld.global.u64 %rd7, [%rd1];  cvt.u32.u64 %r8, %rd7;  mov.b32 %f8, %r8;
        fma.rn.f32 %f8, %f6, %f7, %f8;  mov.b32 %r8, %f8;  cvt.u64.u32 %rd8, %r8;  st.global.u64 [%rd2], %rd8;
    """
    pairs = (bits(a) | bits(b) << 32).view(np.uint64)
    thirds, out = bits(c).view(np.uint64), np.zeros(len(a), np.uint64)
    run(body, pairs, thirds, out, threads=len(a))
    for x, y, z, found in zip(a, b, c, floats(out), strict=True):
        if np.isfinite(x):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            assert Fraction(float(found)) == rounded(exact), (x, y, z)
        else:
            assert np.isnan(found)


def rounded(x: Fraction) -> Fraction:
    """Return the nearest fp32 number; of two, the even one."""
    if x == 0:
        return x
    exponent = max(abs(x.numerator).bit_length() - x.denominator.bit_length(), -126)
    if abs(x) < Fraction(2) ** exponent and exponent > -126:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_floats(kind: str, dtype: torch.dtype) -> None:
    """Every number widens as in torch, and numbers of all sizes, midpoints among them, are rounded as in torch."""
    every = np.arange(1 << 16)
    body = f"cvt.u16.u32 %rs1, %r6; cvt.f32.{kind} %f8, %rs1; mov.b32 %r8, %f8; cvt.u64.u32 %rd8, %r8;"
    wide = torch.from_numpy(every.astype(np.uint16).view(np.int16)).view(dtype).float()
    found = torch.from_numpy(floats(applied(body, every, threads=len(every))))
    torch.testing.assert_close(found, wide, rtol=0, atol=0, equal_nan=True)
    x = wide[wide.isfinite()]
    halves = (x[1:].double() + x[:-1].double()) / 2
    numbers = torch.cat(
        [halves.float(), torch.nextafter(halves.float(), torch.tensor(9e9)), torch.randn(999).exp(), wide]
    )
    narrow = numbers.to(dtype)
    body = f"cvt.rn.{kind}.f32 %rs1, %f6; cvt.rn.{kind}x2.f32 %r7, %f7, %f6; mov.b32 %r8, {{%rs1, %rs1}}; mov.b64 %rd8, {{%r8, %r7}};"
    n = len(numbers)
    found16 = (
        applied(body, bits(numbers.numpy()), bits(np.roll(numbers.numpy(), 1)), threads=n).view(np.uint16).reshape(n, 4)
    )
    wanted = narrow.view(torch.int16).numpy().view(np.uint16)
    nan = narrow.isnan().numpy()
    wanted[nan] = 0x7FFF
    assert np.array_equal(found16[:, 0], wanted) and np.array_equal(found16[:, 2], wanted)
    assert np.array_equal(found16[:, 3], np.roll(wanted, 1))


def test_floats_to_integers_and_back() -> None:
    numbers = np.array([0.5, 1.5, -2.5, 2.0**31, -(2.0**31), 3e9, -1.0, np.nan, np.inf, 5e9], "f4")
    for text, wanted in {
        "cvt.rzi.s32.f32": [0, 1, -2, 2**31 - 1, -(2**31), 2**31 - 1, -1, 0, 2**31 - 1, 2**31 - 1],
        "cvt.rni.s32.f32": [0, 2, -2, 2**31 - 1, -(2**31), 2**31 - 1, -1, 0, 2**31 - 1, 2**31 - 1],
        "cvt.rzi.u32.f32": [0, 1, 0, 2**31, 0, 3 * 10**9, 0, 0, M32, M32],
    }.items():
        found = applied(f"{text} %r8, %f6; cvt.u64.u32 %rd8, %r8;", bits(numbers), threads=len(numbers))
        assert found.tolist() == [w & M32 for w in wanted], text
    found = applied("cvt.rn.f32.u32 %f8, %r6; mov.b32 %r8, %f8; cvt.u64.u32 %rd8, %r8;", WORDS, threads=len(WORDS))
    assert np.array_equal(floats(found), np.array(WORDS, np.uint32).astype("f4"))


# ---- order of execution ---------------------------------------------------------------------------------------------


def test_a_loop_of_its_own_length_in_every_lane() -> None:
    """Lane n adds 1 to n."""
    body = """
        mov.u32 %r6, 0;  mov.u32 %r7, 0;
    $LOOP:
        setp.ge.u32 %p1, %r6, %r0;
        @%p1 bra $DONE;
        add.s32 %r6, %r6, 1;
        add.s32 %r7, %r7, %r6;
        bra.uni $LOOP;
    $DONE:
        cvt.u64.u32 %rd8, %r7;
        st.global.u64 [%rd0], %rd8;
    """
    out = np.zeros(96 * 3, np.uint64)
    run(body, out, grid=3, threads=96)
    assert out.tolist() == [n * (n + 1) // 2 for n in range(96 * 3)]


def test_guards_and_an_early_end() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 20;
        mov.u32 %r6, 1;
        @%p1 mov.u32 %r6, 2;
        @!%p1 add.s32 %r6, %r6, 7;
        setp.eq.s32 %p2, %r0, 5;
        @%p2 ret;
        cvt.u64.u32 %rd8, %r6;
        st.global.u64 [%rd0], %rd8;
    """
    out = np.zeros(32, np.uint64)
    run(body, out)
    assert out.tolist() == [0 if n == 5 else 2 if n < 20 else 8 for n in range(32)]


def test_names_between_braces_are_local() -> None:
    body = """
        mov.u32 %r6, 3;
        // begin inline asm
        { .reg .b32 %r6, low; mov.u32 %r6, 40; mov.u32 low, 2; add.s32 %r7, %r6, low; }
        { .reg .b16 low;
          cvt.u16.u32 low, %r7; mov.b32 %r7, {low, low}; }
        // end inline asm
        add.s32 %r7, %r7, %r6;
        cvt.u64.u32 %rd8, %r7;
        st.global.u64 [%rd0], %rd8;
    """
    out = np.zeros(32, np.uint64)
    run(body, out)
    assert set(out.tolist()) == {(42 << 16 | 42) + 3}


# Thread n leaves its number in shared memory, and reads that of the thread opposite.
REVERSE = """
    .shared .align 4 .b8 numbers[1024];
    mov.u32 %r5, %tid.x;
    shl.b32 %r6, %r5, 2;
    mov.u32 %r7, numbers;
    add.s32 %r8, %r7, %r6;
    st.shared.u32 [%r8], %r0;
    bar.sync 0;
    sub.s32 %r9, %r2, %r5;
    mad.lo.s32 %r9, %r9, 4, %r7;
    ld.shared.u32 %r10, [%r9+-4];
    cvt.u64.u32 %rd8, %r10;
    st.global.u64 [%rd0], %rd8;
"""


def reversed_blocks(grid: int, threads: int) -> list[int]:
    return [b * threads + n for b in range(grid) for n in reversed(range(threads))]


@pytest.mark.parametrize("seed", range(4))
def test_barriers(seed: int) -> None:
    out = np.zeros(5 * 256, np.uint64)
    run(REVERSE, out, grid=5, threads=256, seed=seed)
    assert out.tolist() == reversed_blocks(5, 256)


def test_a_missing_barrier_is_a_race_and_gives_wrong_numbers() -> None:
    body = REVERSE.replace("bar.sync 0;", "")
    out = np.zeros(5 * 256, np.uint64)
    with pytest.raises(PtxError, match=r"k, block \d, thread \d+, 'ld.shared.u32 .*': a race"):
        run(body, out, grid=5, threads=256)
    wrong = 0
    for seed in range(6):
        run(body, out, grid=5, threads=256, seed=seed, races=False)
        wrong += out.tolist() != reversed_blocks(5, 256)
    assert wrong > 0


def test_a_second_write_without_a_barrier_is_a_race() -> None:
    body = REVERSE.replace("cvt.u64.u32", "st.shared.u32 [%r8], %r0; cvt.u64.u32", 1)
    with pytest.raises(PtxError, match=r"'st.shared.u32 \[%r8\], %r0': a race"):
        run(body, np.zeros(256, np.uint64), threads=256)
    run(REVERSE.replace("cvt.u64.u32", "bar.sync 0; st.shared.u32 [%r8], %r0; cvt.u64.u32"), np.zeros(256, np.uint64), threads=256)  # fmt: skip


def test_two_warps_that_write_one_place_at_a_time() -> None:
    body = "mov.u32 %r7, numbers; st.shared.u32 [%r7], %r0;"
    outside = ".shared .align 4 .b8 numbers[4];"
    run(body, outside=outside, threads=32)
    with pytest.raises(PtxError, match="a race"):
        run(body, outside=outside, threads=64)


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffles(mode: str) -> None:
    amount = {"bfly": 5, "idx": 3, "up": 2, "down": 9}[mode]
    clamp = 0 if mode == "up" else 31
    body = f"""
        shfl.sync.{mode}.b32 %r6|%p1, %r0, {amount}, {clamp}, -1;
        selp.b32 %r7, 1000, 0, %p1;
        add.s32 %r7, %r7, %r6;
        cvt.u64.u32 %rd8, %r7;
        st.global.u64 [%rd0], %rd8;
    """
    out = np.zeros(64, np.uint64)
    run(body, out, threads=64)
    wanted = []
    for n in range(64):
        lane, warp = n % 32, n // 32 * 32
        source = {"bfly": lane ^ amount, "idx": amount, "up": lane - amount, "down": lane + amount}[mode]
        wanted.append(warp + source + 1000 if 0 <= source < 32 else n)
    assert out.tolist() == wanted


def test_a_shuffle_waits_for_lanes_on_another_way() -> None:
    """The lanes part before the shuffle, one way without a label of its own at the end, and meet there."""
    body = """
        mov.u32 %r6, %r0;
        setp.lt.u32 %p1, %r0, 10;
        @%p1 bra $FEW;
        shfl.sync.bfly.b32 %r7, %r6, 1, 31, MASK;
        bra.uni $DONE;
    $FEW:
        add.s32 %r6, %r6, 100;
        shfl.sync.bfly.b32 %r7, %r6, 1, 31, MASK;
    $DONE:
        cvt.u64.u32 %rd8, %r7;
        st.global.u64 [%rd0], %rd8;
    """
    with pytest.raises(PtxError, match=r"threads wait at 'shfl.sync.bfly.b32"):
        run(body.replace("MASK", "0xffffffff"), np.zeros(32, np.uint64))


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count: int, trans: str) -> None:
    """ldmatrix gives a lane two elements of a row, or of a column; stmatrix writes them back."""
    names = ", ".join(f"%r{10 + k}" for k in range(count))
    body = f"""
        mov.u32 %r5, %tid.x;
        and.b32 %r6, %r5, {8 * count - 1};
        shl.b32 %r6, %r6, 4;
        mov.u32 %r7, room;
        add.s32 %r8, %r7, %r6;
        mul.lo.s32 %r9, %r5, 16;
        cvt.u64.u32 %rd5, %r9;
        ld.param.u64 %rd4, [k_param_0];
        add.s64 %rd5, %rd4, %rd5;
        setp.lt.u32 %p1, %r5, {8 * count};
        @%p1 ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd5];
        @%p1 st.shared.v4.b32 [%r8], {{%r1, %r2, %r3, %r4}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r8];
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {{{names}}};
        @%p1 ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r8];
        ld.param.u64 %rd4, [k_param_2];
        mul.wide.u32 %rd5, %r9, 1;
        add.s64 %rd5, %rd4, %rd5;
        @%p1 st.global.v4.u32 [%rd5], {{%r1, %r2, %r3, %r4}};
        mul.lo.s32 %r9, %r5, {4 * count};
        cvt.u64.u32 %rd5, %r9;
        ld.param.u64 %rd4, [k_param_1];
        add.s64 %rd5, %rd4, %rd5;
        {"".join(f"st.global.u32 [%rd5+{4 * k}], %r{10 + k};" for k in range(count))}
    """
    rng = np.random.default_rng(0)
    elements = rng.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    matrices = np.zeros(64, np.uint64)
    matrices.view(np.uint16)[: 64 * count] = elements.ravel()
    out, back = np.zeros(32 * 4 // 2, np.uint64), np.zeros(64, np.uint64)
    run(body, matrices, out, back, outside=".shared .align 16 .b8 room[512];")
    found = out.view(np.uint16)[: 64 * count].reshape(32, count, 2)
    for lane in range(32):
        for k in range(count):
            m = elements[k].T if trans else elements[k]
            assert found[lane, k].tolist() == m[lane // 4, 2 * (lane % 4) :][:2].tolist()
    assert np.array_equal(back, matrices)


# ---- between blocks -------------------------------------------------------------------------------------------------

# Every block stores a number in a slot and takes a ticket. The block with the last ticket adds the slots up.
TICKET = """
    ld.param.u64 %rd4, [k_param_0];
    ld.param.u64 %rd5, [k_param_1];
    ld.param.u64 %rd6, [k_param_2];
    mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %tid.x;
    setp.ne.s32 %p1, %r4, 0;
    @%p1 bra $READ;
    mul.wide.u32 %rd7, %r1, 4;
    add.s64 %rd7, %rd4, %rd7;
    add.s32 %r5, %r1, 1;
    st.global.u32 [%rd7], %r5;
    membar.gl;
    atom.global.add.u32 %r6, [%rd5], 1;
    st.shared.u32 [before], %r6;
$READ:
    bar.sync 0;
    ld.shared.u32 %r6, [before];
    add.s32 %r7, %r3, -1;
    setp.ne.s32 %p2, %r6, %r7;
    @%p2 ret;
    membar.gl;
    @%p1 ret;
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
$LOOP:
    mul.wide.u32 %rd7, %r8, 4;
    add.s64 %rd7, %rd4, %rd7;
    ld.global.cg.u32 %r10, [%rd7];
    add.s32 %r9, %r9, %r10;
    add.s32 %r8, %r8, 1;
    setp.lt.u32 %p3, %r8, %r3;
    @%p3 bra $LOOP;
    st.global.u32 [%rd6], %r9;
    st.global.u32 [%rd5], 0;
"""
SHARED = ".shared .align 4 .b8 before[4];"


def summed(body: str, grid: int = 12, **how: Any) -> tuple[int, int]:
    slots, ticket, total = np.zeros(grid, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    run(body, slots, ticket, total, grid=grid, threads=64, outside=SHARED, start=START.split("mad.lo")[0], **how)
    return int(total[0]), int(ticket[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_last_block_sees_what_a_fence_and_a_ticket_publish(seed: int) -> None:
    assert summed(TICKET, seed=seed) == (78, 0)
    assert summed(TICKET, seed=seed, lanes=256) == (78, 0)  # four blocks at a time
    assert summed(TICKET, seed=seed, delays=False) == (78, 0)


def test_an_atomic_that_acquires_and_releases_needs_no_fence() -> None:
    body = TICKET.replace("membar.gl;", "")
    assert summed(body.replace("atom.global.add", "atom.global.gpu.acq_rel.add")) == (78, 0)
    for semantics in ("acquire", "release", "relaxed"):
        with pytest.raises(PtxError, match="a race"):
            summed(body.replace("atom.global.add", f"atom.global.gpu.{semantics}.add"))


@pytest.mark.parametrize("fence", [1, 2])
def test_a_missing_fence_is_a_race(fence: int) -> None:
    parts = TICKET.split("membar.gl;")
    body = "".join([parts[0], *(("" if k == fence else "membar.gl;") + part for k, part in enumerate(parts[1:], 1))])
    with pytest.raises(PtxError, match=r"'ld.global.cg.u32 .*': a race"):
        summed(body)


def test_a_missing_fence_before_the_ticket_gives_a_wrong_sum_where_stores_are_delayed() -> None:
    body = TICKET.replace("membar.gl;", "", 1)
    for seed in range(3):
        assert summed(body, races=False, seed=seed)[0] < 78
        assert summed(body, races=False, seed=seed, delays=False) == (78, 0)


def test_blocks_come_in_an_order_of_the_seed() -> None:
    body = "ld.param.u64 %rd4, [k_param_0]; atom.global.add.u32 %r6, [%rd4], 1; cvt.u64.u32 %rd8, %r6; st.global.u64 [%rd1], %rd8;"
    orders = []
    for seed in (0, 0, 1):
        counter, out = np.zeros(1, np.uint32), np.zeros(20, np.uint64)
        run(body, counter, out, grid=20, threads=1, seed=seed)
        assert sorted(out.tolist()) == list(range(20)) and counter[0] == 20
        orders.append(out.tolist())
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_blocks_that_write_what_others_read() -> None:
    body = "ld.param.u64 %rd4, [k_param_0]; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.u64 [%rd4], %rd3; {} ld.global.u64 %rd8, [%rd4];"
    with pytest.raises(PtxError, match="a race"):
        run(body.format(""), np.zeros(1, np.uint64), grid=2, threads=1)
    with pytest.raises(PtxError, match="a race"):
        run(body.format("bar.sync 0;"), np.zeros(1, np.uint64), grid=2, threads=1)


# ---- what is reported -----------------------------------------------------------------------------------------------

NAMED = r"k, block 0, thread {}, '.*': {}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u64 %rd8, [%rd0+8];", NAMED.format(31, "out of bounds: 8 bytes at byte 256 of array 0, which has 256")),
        ("st.global.u64 [%rd0+-8], %rd8;", NAMED.format(0, "out of bounds")),
        ("ld.global.u64 %rd8, [%rd0+4];", NAMED.format(0, "misaligned: 8 bytes at byte 4 of array 0, which has 256, 4 past")),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0];", NAMED.format(1, "misaligned: 16 bytes at byte 8")),
        ("ld.global.u32 %r8, [%rd3];", NAMED.format(0, r"out of bounds: 4 bytes at 0x0, before all regions")),
        ("ld.shared.u32 %r8, [room+16];", NAMED.format(0, "out of bounds: 4 bytes at byte 16 of shared memory, which has 16")),
        ("ld.shared.u32 %r8, [room+2];", NAMED.format(0, "misaligned: 4 bytes at byte 2 of shared memory")),
        ("ld.param.u64 %rd8, [k_param_2+8];", NAMED.format(0, "8 bytes at byte 24 of the 24 of arguments")),
        ("st.global.u64 [%rd0], %rd8; ld.global.nc.u64 %rd8, [%rd0];", NAMED.format(0, "a load as constant")),
        ("setp.eq.s32 %p1, %r0, 3; @%p1 ret; bar.sync 0;", "threads wait at 'bar.sync 0', and others have"),
        ("setp.eq.s32 %p1, %r0, 3; @%p1 ret; shfl.sync.bfly.b32 %r6, %r0, 1, 31, -1;", "threads wait at 'shfl"),
        ("$AGAIN: bra.uni $AGAIN;", "k does not end"),
        ("bra.uni $NOWHERE;", "a branch to no label: 'bra.uni .NOWHERE'"),
        ("mov.u32 %r6, nothing;", "the name 'nothing' is not declared"),
        ("add.s32 %r6, %rs1, 1;", "an operand of 2 bytes as s32: 'add.s32 %r6, %rs1, 1'"),
    ],
)  # fmt: skip
def test_errors_name_the_place(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.ptx.machine._MOST_TURNS", 1000)
    array = np.zeros(34, np.uint64)[: 33 - 1]
    array = array[array.ctypes.data // 8 % 2 :][:32] if array.ctypes.data % 16 else array
    with pytest.raises(PtxError, match=message):
        run(body, array, outside=".shared .align 16 .b8 room[16];")


@pytest.mark.parametrize(
    "text",
    [
        "fancy.op.f32 %f6, %f7", "add.sat.s32 %r6, %r6, %r7", "add.rz.f32 %f6, %f6, %f7", "ld.local.u32 %r6, [%rd0]",
        "ld.u32 %r6, [%rd0]", "atom.shared.add.u32 %r6, [%r7], 1", "cvt.rz.f16.f32 %rs1, %f6", "bar.sync 0, 64",
        "brx.idx %r6, targets", "cvt.rn.satfinite.bf16x2.f32 %r6, %f6, %f7", "fma.rn.f64 %rd1, %rd1, %rd1, %rd1",
    ],
)  # fmt: skip
def test_an_unknown_opcode_is_named(text: str) -> None:
    with pytest.raises(UnknownOpcodeError, match=re.escape(text.split()[0])):
        run(f"{text};")


def test_what_a_launch_must_fit() -> None:
    (kernel,) = kernels_of(module("", directives=".maxntid 64, 1, 1")).values()
    with pytest.raises(PtxError, match="k takes at most 64 threads, not 65"):
        launch(kernel, 1, 65, bytes(24), [])
    with pytest.raises(PtxError, match="k has 24 bytes of parameters, not 20"):
        launch(kernel, 1, 64, bytes(20), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no .entry"),
        (f"{HEAD}.entry k() {{ ret;", "no closing brace"),
        (f"{HEAD}.entry k(.param .odd x) {{ ret; }}", "a parameter cannot be read"),
        (f"{HEAD}.entry k() {{ mov.u32 %r1 }}", "a statement cannot be read"),
        (f"{HEAD}.entry k() {{ .reg .odd %r<2>; }}", "registers of an unknown type"),
        (f"{HEAD}.entry k() {{ .reg .b32 %r<2>; ld.global.u32 %r1, [%r0*4]; }}", "an address cannot be read"),
    ],
)
def test_text_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        _ = [kernel.body for kernel in kernels_of(text).values()]


def test_parameters_and_shared_memory_lie_as_declared() -> None:
    text = f"""{HEAD}
    .extern .shared .align 16 .b8 pool[];
    .shared .align 1 .u8 flag;
    .visible .entry k(.param .u32 a, .param .align 8 .b8 b[12], .param .u64 .ptr .global .align 1 c, .param .f32 d)
    {{ .shared .align 8 .b8 sums[20]; ret; }}"""
    (kernel,) = kernels_of(text).values()
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("a", 0, 4),
        ("b", 8, 12),
        ("c", 24, 8),
        ("d", 32, 4),
    ]
    assert kernel.parameter_bytes == 36
    assert (
        kernel.body.shared == {"flag": 0, "sums": 8} and kernel.body.shared_bytes == 28 and kernel.external == ["pool"]
    )


def test_regions_that_overlap_are_one() -> None:
    array = np.arange(8, dtype=np.uint64)
    (kernel,) = kernels_of(module("ld.global.u64 %rd8, [%rd0+8]; st.global.u64 [%rd0], %rd8;")).values()
    regions: Sequence[Region] = [Region(array.ctypes.data + 8, 56, "end"), Region(array.ctypes.data, 40, "begin")]
    arguments = np.array([array.ctypes.data] * 3, np.uint64).tobytes()
    launch(kernel, 1, 1, arguments, regions)
    assert array.tolist() == [1, 1, 2, 3, 4, 5, 6, 7]
