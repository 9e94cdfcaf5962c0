"""Instructions that move and convert: mov, cvt and cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import flushed
from .errors import UnknownOpcodeError
from .operands import DTYPES, Operation, Run, mods_of, only, reader, writer
from .parser import Vector

F32, F64, U16, U32 = np.float32, np.float64, np.uint16, np.uint32

# How a float becomes an integer, or a float with an integer's value.
_ROUNDINGS: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_f16(x: Any) -> Any:
    return np.where(np.isnan(x), U16(0x7FFF), np.asarray(x).astype(np.float16).view(U16))


def _to_bf16(x: Any) -> Any:
    bits = np.asarray(x, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def _from_f16(bits: Any) -> Any:
    return bits.view(np.float16).astype(F32)


def _from_bf16(bits: Any) -> Any:
    return (bits.astype(U32) << U32(16)).view(F32)


_NARROW = {"f16": _to_f16, "bf16": _to_bf16}
_WIDEN = {"f16": _from_f16, "bf16": _from_bf16}


def _to_integer(x: Any, dtype: Any) -> Any:
    """Return the nearest integer of the type; NaN becomes 0."""
    limits = np.iinfo(dtype)
    x = np.where(np.isnan(x), 0, x).astype(F64)
    inside = np.clip(x, float(limits.min), float(limits.max))
    # Above 2^53 the upper limit is no double.
    return np.where(x >= float(limits.max), limits.max, np.where(x >= float(limits.max), 0, inside).astype(dtype))


def _convert(op: Operation, mods: list[str]) -> Run:
    *middle, to, of = mods
    if to in ("f16x2", "bf16x2") and of == "f32":
        only(op, middle, {"rn"})
        narrow = _NARROW[to[:-2]]
        write, high, low = writer(op, 0, "b32"), reader(op, 1, "f32"), reader(op, 2, "f32")

        def pair(m: Any, at: Any) -> None:
            upper, lower = narrow(high(m, at)).astype(U32), narrow(low(m, at)).astype(U32)
            write(m, at, (upper << U32(16)) | lower)

        return pair
    rounding = next((_ROUNDINGS[m] for m in middle if m in _ROUNDINGS), None)
    if to in _NARROW and of == "f32" and middle == ["rn"]:
        write, read, function = writer(op, 0, "b16"), reader(op, 1, "f32"), _NARROW[to]
        return lambda m, at: write(m, at, function(read(m, at)))
    if of in _WIDEN and to == "f32" and not middle:
        write, read, function = writer(op, 0, "f32"), reader(op, 1, "b16"), _WIDEN[of]
        return lambda m, at: write(m, at, function(read(m, at)))
    if to not in DTYPES or of not in DTYPES or "f16" in (to, of):
        raise UnknownOpcodeError(op.opcode)
    write, read, dtype = writer(op, 0, to), reader(op, 1, of), DTYPES[to]
    from_float, to_float = of[0] == "f", to[0] == "f"
    only(op, middle, {*_ROUNDINGS, "ftz"} if from_float and (to == of or not to_float) else {"rn", "ftz"})
    if (from_float and (to == of or not to_float)) != (rounding is not None):
        raise UnknownOpcodeError(op.opcode)
    flush = flushed if "ftz" in middle and of == "f32" else (lambda x: x)
    if rounding is None:
        return lambda m, at: write(m, at, flush(read(m, at)).astype(dtype))
    if to_float:
        return lambda m, at: write(m, at, rounding(flush(read(m, at))))
    return lambda m, at: write(m, at, _to_integer(rounding(flush(read(m, at))), dtype))


def _move(op: Operation, kind: str) -> Run:
    bits = kind if kind == "pred" else f"b{8 * DTYPES[kind].itemsize}"
    to, of = op.operands
    if isinstance(of, Vector):  # packs: the first is the lowest
        size = DTYPES[bits].itemsize * 8 // len(of.parts)
        write, reads = writer(op, 0, bits), [reader(op, part, f"b{size}") for part in of.parts]
        wide = DTYPES[bits]

        def pack(m: Any, at: Any) -> None:
            result = wide.type(0)
            for k, read in enumerate(reads):
                result = result | (read(m, at).astype(wide) << wide.type(k * size))
            write(m, at, result)

        return pack
    read = reader(op, 1, bits)
    if isinstance(to, Vector):
        size = DTYPES[bits].itemsize * 8 // len(to.parts)
        writes = [writer(op, part, f"b{size}") for part in to.parts]
        wide, narrow = DTYPES[bits], DTYPES[f"b{size}"]

        def unpack(m: Any, at: Any) -> None:
            value = read(m, at)
            for k, write in enumerate(writes):
                write(m, at, (value >> wide.type(k * size)).astype(narrow))

        return unpack
    write = writer(op, 0, bits)
    return lambda m, at: write(m, at, read(m, at))


def build(op: Operation) -> Run | None:
    """Return the function of a mov, cvt or cvta; None for other instructions."""
    base, *mods = mods_of(op)
    if base == "mov":
        if len(mods) != 1 or mods[0] not in DTYPES:
            raise UnknownOpcodeError(op.opcode)
        return _move(op, mods[0])
    if base == "cvt":
        return _convert(op, mods)
    if (
        base == "cvta"
    ):  # addresses of global memory are generic ones, and those of parameters and of shared memory are not
        if mods not in (["to", "global", "u64"], ["global", "u64"]):
            raise UnknownOpcodeError(op.opcode)
        return _move(op, "u64")
    return None
