"""Operands as functions: how an instruction reads and writes the registers of some lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PtxError, UnknownOpcodeError
from .parser import Immediate, Kernel, Negated, Operand, Register, Symbol

if TYPE_CHECKING:
    from .machine import Machine
    from .parser import Instruction

# A function of a machine and of lanes: a slice, or an array of their numbers.
Run = Callable[["Machine", Any], None]
Read = Callable[["Machine", Any], Any]
Write = Callable[["Machine", Any, Any], None]

_KINDS = {"b": "u", "u": "u", "s": "i"}
DTYPES = {f"{k}{8 * n}": np.dtype(f"{t}{n}") for k, t in _KINDS.items() for n in (1, 2, 4, 8)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


class Names:
    """What the names of a kernel's instructions mean."""

    def __init__(self, kernel: Kernel) -> None:
        body = kernel.body
        self.labels = body.labels
        # A register's index and its bytes.
        self.registers = {name: (k, width) for k, (name, width) in enumerate(body.registers.items())}
        # Addresses of parameters and of variables in shared memory. Those of external size begin behind the others.
        self.constants = {p.name: p.offset for p in kernel.parameters} | body.shared
        self.constants |= dict.fromkeys(kernel.external, -(-body.shared_bytes // 16) * 16)


class Operation:
    """An instruction with its kernel's names."""

    def __init__(self, instruction: Instruction, names: Names) -> None:
        self.opcode, self.operands, self.text = instruction.opcode, instruction.operands, instruction.text
        self.names = names

    def register(self, operand: Register) -> tuple[int, int]:
        """Return a register's index and its bytes."""
        return self.names.registers[operand.name]

    def constant(self, operand: Symbol) -> int:
        """Return the address of a parameter or of a variable in shared memory."""
        if operand.name not in self.names.constants:
            raise PtxError(f"the name {operand.name!r} is not declared: {self.text!r}")
        return self.names.constants[operand.name]


def mods_of(op: Operation) -> list[str]:
    """Return the words of an opcode."""
    return op.opcode.split(".")


def only(op: Operation, mods: Iterable[str], known: set[str]) -> None:
    """Raise an error for words of an opcode that are not implemented."""
    if set(mods) - known:
        raise UnknownOpcodeError(op.opcode)


def reader(op: Operation, operand: int | Operand, kind: str) -> Read:
    """Return a function that reads an operand as numbers of a type."""
    if isinstance(operand, int):
        if operand >= len(op.operands):
            raise PtxError(f"an operand is missing: {op.text!r}")
        operand = op.operands[operand]
    if kind not in DTYPES:
        raise UnknownOpcodeError(op.opcode)
    dtype = DTYPES[kind]
    if isinstance(operand, Negated):
        plain = reader(op, operand.operand, "pred")
        return lambda m, at: ~plain(m, at)
    if isinstance(operand, Symbol):
        if operand.name.startswith("%"):
            name = operand.name
            return lambda m, at: m.special[name][at].astype(dtype)
        operand = Immediate(op.constant(operand))
    if isinstance(operand, Immediate):
        value = _immediate(operand, dtype)
        return lambda m, at: value
    if not isinstance(operand, Register):
        raise PtxError(f"an operand that is no register: {op.text!r}")
    k, width = op.register(operand)
    if (kind == "pred") != (width == 1) or width < dtype.itemsize:
        raise PtxError(f"an operand of {width} bytes as {kind}: {op.text!r}")
    if kind == "pred" or dtype == UNSIGNED[width]:
        return lambda m, at: m.registers[k][at]
    if width == dtype.itemsize:
        return lambda m, at: m.registers[k][at].view(dtype)
    narrow = UNSIGNED[dtype.itemsize]
    return lambda m, at: m.registers[k][at].astype(narrow).view(dtype)


def _immediate(operand: Immediate, dtype: Any) -> Any:
    if dtype.kind == "b":
        return np.bool_(operand.value & 1)
    if dtype == np.float32 and not operand.is_float:
        raise PtxError(f"the integer {operand.value} as fp32")
    bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
    return UNSIGNED[dtype.itemsize].type(bits).view(dtype)


def writer(op: Operation, operand: int | Operand, kind: str) -> Write:
    """Return a function that writes numbers of a type into a register, extended if it is wider."""
    if isinstance(operand, int):
        operand = op.operands[operand]
    dtype = DTYPES[kind]
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda m, at, value: None
    if not isinstance(operand, Register):
        raise PtxError(f"a result that is no register: {op.text!r}")
    k, width = op.register(operand)
    if (kind == "pred") != (width == 1) or width < dtype.itemsize:
        raise PtxError(f"a result of type {kind} in {width} bytes: {op.text!r}")

    def write(m: Machine, at: Any, value: Any) -> None:
        m.registers[k][at] = value

    def write_bits(m: Machine, at: Any, value: Any) -> None:
        m.registers[k][at] = value.view(unsigned)

    def extend(m: Machine, at: Any, value: Any) -> None:
        m.registers[k][at] = value.astype(wide).view(unsigned)

    if kind == "pred":
        return write
    unsigned = UNSIGNED[width]
    if width == dtype.itemsize:
        return write if dtype == unsigned else write_bits
    wide = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{width}")
    return extend
