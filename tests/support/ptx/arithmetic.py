"""Instructions on registers: integers, fp32, predicates and comparisons. conversions.py has the rest.

A builder takes an instruction and returns a function of a machine and of lanes, an index into the registers' arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import UnknownOpcodeError
from .operands import DTYPES, Operation, Run, mods_of, only, reader, writer

F32, F64, U32, U64, I64 = np.float32, np.float64, np.uint32, np.uint64, np.int64

BITWISE: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _simple(op: Operation, kind: str, function: Callable[..., Any], result: str | None = None) -> Run:
    """Apply a function of all operands but the first to operands of type `kind`."""
    write = writer(op, 0, result or kind)
    reads = [reader(op, k, kind) for k in range(1, len(op.operands))]
    if len(reads) == 1:
        (a,) = reads
        return lambda m, at: write(m, at, function(a(m, at)))
    if len(reads) == 2:
        a, b = reads
        return lambda m, at: write(m, at, function(a(m, at), b(m, at)))
    a, b, c = reads
    return lambda m, at: write(m, at, function(a(m, at), b(m, at), c(m, at)))


# ---- fp32 -----------------------------------------------------------------------------------------------------------


def flushed(x: Any) -> Any:
    """Return fp32 numbers with 0 in place of subnormal ones, as .ftz does."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact
    total = np.asarray(product + c)
    bits = total.view(I64)
    # Rounding a double to fp32 is right unless the double is a midpoint, or the result is subnormal.
    if not (((bits & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2.0**-126)).any():
        return total.astype(F32)
    c = np.asarray(c, F64)
    part = total - product
    error = (product - (total - part)) + (c - part)
    # To odd: a double that is not exact gets an odd last bit, so that the second rounding cannot see a midpoint.
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    odd = bits + np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return odd.view(F64).astype(F32)


def _extreme(function: Any, zeros: Any, *, propagate: bool) -> Callable[[Any, Any], Any]:
    def run(a: Any, b: Any) -> Any:
        result = np.asarray(function(a, b), F32)
        bits = zeros(np.asarray(a, F32).view(U32), np.asarray(b, F32).view(U32))
        result = np.where(np.equal(a, b), bits.view(F32), result)  # 0 and -0 are ordered
        return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), result) if propagate else result

    return run


def _reciprocal(x: Any) -> Any:
    return F32(1) / x


_FLOATS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma, "mad": fma, "neg": np.negative,
    "abs": np.abs, "sqrt": np.sqrt, "rcp": _reciprocal, "rsqrt": lambda x: (1 / np.sqrt(x.astype(F64))).astype(F32),
    "ex2": lambda x: np.exp2(x.astype(F64)).astype(F32), "lg2": lambda x: np.log2(x.astype(F64)).astype(F32),
}  # fmt: skip


def _float(op: Operation, base: str, mods: list[str]) -> Run:
    only(op, mods, {"rn", "full", "approx", "ftz", "NaN"})
    if base in ("min", "max"):
        of = (np.fmax, np.bitwise_and) if base == "max" else (np.fmin, np.bitwise_or)
        function: Callable[..., Any] = _extreme(*of, propagate="NaN" in mods)
    elif base in _FLOATS:
        function = _FLOATS[base]
    else:
        raise UnknownOpcodeError(op.opcode)
    if "ftz" in mods:
        plain = function

        def function(*args: Any) -> Any:
            return flushed(plain(*map(flushed, args)))

    return _simple(op, "f32", function)


# ---- integers -------------------------------------------------------------------------------------------------------


def _shift_left(a: Any, n: Any) -> Any:
    bits = a.dtype.itemsize * 8
    return np.where(n < bits, np.left_shift(a, np.minimum(n, bits - 1).astype(a.dtype)), a.dtype.type(0))


def _shift_right(a: Any, n: Any) -> Any:
    bits = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(n, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a))  # towards zero


_INTEGERS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "neg": lambda a: (~a + 1).astype(a.dtype), "not": np.bitwise_not,
    "min": np.minimum, "max": np.maximum, "abs": np.abs, "div": _divide, "rem": np.fmod, **BITWISE,
}  # fmt: skip


def _product(op: Operation, base: str, kind: str, mods: list[str]) -> Run:
    """mul and mad of integers, of the lower half, the upper half or the whole."""
    only(op, mods, {"lo", "hi", "wide"})
    bits = int(kind[1:])
    wide = np.dtype(I64 if kind[0] == "s" else U64)
    if "wide" in mods:
        result, target = f"{kind[0]}{2 * bits}", None
    elif "lo" in mods:
        result, target = kind, None
    elif bits == 32:
        result, target = kind, wide
    else:
        raise UnknownOpcodeError(op.opcode)
    write = writer(op, 0, result)
    a, b = reader(op, 1, kind), reader(op, 2, kind)
    c = reader(op, 3, result) if base == "mad" else None
    to = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{(2 * bits if 'wide' in mods else bits) // 8}")

    def run(m: Any, at: Any) -> None:
        x, y = a(m, at), b(m, at)
        if target is not None:
            found = ((x.astype(target) * y.astype(target)) >> target.type(32)).astype(to)
        elif "wide" in mods:
            found = np.multiply(x, y, dtype=to)
        else:
            found = np.multiply(x, y)
        write(m, at, found if c is None else found + c(m, at))

    return run


def _field(op: Operation, kind: str) -> Run:
    """bfe: bits `position` .. `position + length - 1`, with the sign of the last."""
    if kind not in ("u32", "s32"):
        raise UnknownOpcodeError(op.opcode)
    write, read = writer(op, 0, kind), reader(op, 1, kind)
    position, length = reader(op, 2, "u32"), reader(op, 3, "u32")

    def run(m: Any, at: Any) -> None:
        start, count = ((x(m, at) & 255).astype(I64) for x in (position, length))
        x = np.right_shift(read(m, at).astype(I64), np.minimum(start, 63))
        rest = 64 - np.clip(count, 1, 32)
        if kind == "s32":
            found = np.right_shift(np.left_shift(x, rest), rest)
        else:
            found = np.right_shift(np.left_shift(x, rest).view(U64), rest.astype(U64)).view(I64)
        write(m, at, np.where(count == 0, 0, found).astype(np.int32 if kind == "s32" else U32))

    return run


def _insert(op: Operation) -> Run:
    """bfi: the lowest bits of a at a place of b."""
    write = writer(op, 0, "b32")
    a, b, position, length = (reader(op, k, "b32") for k in range(1, 5))

    def run(m: Any, at: Any) -> None:
        start, count = ((x(m, at) & 255).astype(U64) for x in (position, length))
        start = np.minimum(start, U64(32))
        mask = ((U64(1) << np.minimum(count, U64(32))) - U64(1)) << start
        x, y = a(m, at).astype(U64), b(m, at).astype(U64)
        write(m, at, ((y & ~mask) | ((x << start) & mask)).astype(U32))

    return run


def _permute(op: Operation) -> Run:
    """prmt: four bytes of two registers, each chosen by four bits."""
    write = writer(op, 0, "b32")
    a, b, c = (reader(op, k, "b32") for k in range(1, 4))

    def run(m: Any, at: Any) -> None:
        both = a(m, at).astype(U64) | (b(m, at).astype(U64) << U64(32))
        selector, result = np.asarray(c(m, at)).astype(U64), U64(0)
        for k in range(4):
            nibble = (selector >> U64(4 * k)) & U64(15)
            byte = (both >> ((nibble & U64(7)) * U64(8))) & U64(255)
            sign = np.where(byte & U64(128), U64(255), U64(0))
            result = result | (np.where(nibble & U64(8), sign, byte) << U64(8 * k))
        write(m, at, result.astype(U32))

    return run


def _logic(op: Operation) -> Run:
    """lop3: any function of three bits."""
    write = writer(op, 0, "b32")
    a, b, c = (reader(op, k, "b32") for k in range(1, 4))
    table = getattr(op.operands[4], "value", None)
    if table is None:
        raise UnknownOpcodeError(op.opcode)

    def run(m: Any, at: Any) -> None:
        x, y, z = a(m, at), b(m, at), c(m, at)
        result = U32(0)
        for k in range(8):
            if table >> k & 1:
                result = result | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
        write(m, at, np.broadcast_to(result, np.shape(x)))

    return run


def _funnel(op: Operation, mods: list[str]) -> Run:
    """shf: two registers as one of 64 bits, shifted."""
    only(op, mods, {"l", "r", "wrap", "clamp"})
    write = writer(op, 0, "b32")
    a, b, c = (reader(op, k, "b32") for k in range(1, 4))

    def run(m: Any, at: Any) -> None:
        n = c(m, at).astype(U64)
        n = n & U64(31) if "wrap" in mods else np.minimum(n, U64(32))
        both = a(m, at).astype(U64) | (b(m, at).astype(U64) << U64(32))
        write(m, at, ((both << n) >> U64(32) if "l" in mods else both >> n).astype(U32))

    return run


def _count(op: Operation, base: str) -> Run:
    write, read = writer(op, 0, "u32"), reader(op, 1, "b32")

    def run(m: Any, at: Any) -> None:
        bits = np.unpackbits(np.atleast_1d(read(m, at)).astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
        found = bits.sum(axis=1) if base == "popc" else np.where(bits.any(axis=1), bits.argmax(axis=1), 32)
        write(m, at, found.astype(U32))

    return run


# ---- predicates and comparisons -------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable[[Any, Any], Any] | None:
    """Return a comparison; in fp32, "ne" is false for NaN, and a "u" behind the name makes it true for NaN."""
    if not kind.startswith("f"):
        return _COMPARISONS.get(name)
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    plain = _COMPARISONS.get(name[:2])
    if plain is None or name[2:] not in ("", "u"):
        return None
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name[2:] == "u" and name != "neu":
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    return plain


def _set_predicate(op: Operation, mods: list[str], kind: str) -> Run:
    name, *rest = mods
    compare = _comparison(name, kind)
    joined = next((m for m in rest if m in BITWISE), None)
    only(op, rest, {"ftz", joined or ""})
    targets = len(op.operands) - (3 if joined else 2)
    if compare is None or targets not in (1, 2):
        raise UnknownOpcodeError(op.opcode)
    writes = [writer(op, k, "pred") for k in range(targets)]
    a, b = reader(op, targets, kind), reader(op, targets + 1, kind)
    c = reader(op, targets + 2, "pred") if joined else None
    join = BITWISE[joined] if joined else None

    def run(m: Any, at: Any) -> None:
        x, y = a(m, at), b(m, at)
        if "ftz" in rest:
            x, y = flushed(x), flushed(y)
        found = compare(x, y)
        for write, value in zip(writes, (found, ~np.asarray(found)), strict=False):
            write(m, at, value if c is None else join(value, c(m, at)))

    return run


def _select(op: Operation, kind: str) -> Run:
    bits = f"b{8 * DTYPES[kind].itemsize}"
    write = writer(op, 0, bits)
    a, b, p = reader(op, 1, bits), reader(op, 2, bits), reader(op, 3, "pred")
    return lambda m, at: write(m, at, np.where(p(m, at), a(m, at), b(m, at)))


# ---- all of them ----------------------------------------------------------------------------------------------------


def _sign_of_halves(op: Operation, base: str, kind: str) -> Run:
    """abs and neg of 16-bit floats, alone or two in a register."""
    bits = "b32" if kind.endswith("x2") else "b16"
    sign = np.dtype(U32 if bits == "b32" else np.uint16).type(0x80008000 if bits == "b32" else 0x8000)
    return _simple(op, bits, (lambda a: a & ~sign) if base == "abs" else (lambda a: a ^ sign))


def build(op: Operation) -> Run | None:
    """Return the function of an instruction on integers, fp32 or predicates; None for others."""
    base, *mods = mods_of(op)
    kind = mods[-1] if mods else ""
    middle = mods[:-1]
    if kind == "pred" and base in BITWISE:
        return _simple(op, kind, BITWISE[base])
    if kind == "pred" and base == "not":
        return _simple(op, kind, np.logical_not)
    if base == "setp":
        return _set_predicate(op, middle, kind)
    if base == "selp":
        return _select(op, kind)
    if base in ("abs", "neg") and kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _sign_of_halves(op, base, kind)
    if kind == "f32" and base in (*_FLOATS, "min", "max"):
        return _float(op, base, middle)
    if kind[:1] not in ("b", "u", "s") or not kind[1:].isdigit():
        return None
    if base in ("mul", "mad"):
        return _product(op, base, kind, middle)
    if base in ("shl", "shr"):
        only(op, middle, set())
        write, a, n = writer(op, 0, kind), reader(op, 1, kind), reader(op, 2, "u32")
        shift = _shift_left if base == "shl" else _shift_right
        return lambda m, at: write(m, at, shift(a(m, at), n(m, at)))
    if base == "shf":
        return _funnel(op, middle)
    if kind == "b32" and base in ("popc", "clz"):
        return _count(op, base)
    only_plain = {"bfe": _field, "bfi": lambda i, _: _insert(i), "prmt": lambda i, _: _permute(i),
                  "lop3": lambda i, _: _logic(i)}  # fmt: skip
    if base in only_plain:
        only(op, middle, set())
        return only_plain[base](op, kind)
    if base in _INTEGERS:
        only(op, middle, set())
        return _simple(op, kind, _INTEGERS[base])
    return None
