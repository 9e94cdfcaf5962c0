"""PTX text to kernels: parameters, shared memory, registers and instructions.

A module is split into kernels at once, and a kernel's body is read when it is first used: a file of nvcc has dozens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .errors import PtxError

WIDTHS = {"pred": 1, **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}, "f16": 2, "f32": 4}
WIDTHS |= {"f64": 8, "bf16": 2, "f16x2": 4, "bf16x2": 4}


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    value: int  # of a float, its bits
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    name: str  # a label, a special register, a parameter, or a variable in shared memory; "_" takes no value


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int


@dataclass(frozen=True)
class Negated:
    operand: Register  # a predicate


Operand = Register | Immediate | Symbol | Vector | Address | Negated


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None  # the predicate of the lanes that execute it
    unless: bool  # True if the lanes without the predicate execute it
    text: str


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int
    align: int


@dataclass
class Body:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # bytes of each register that is used; 1: a predicate
    shared: dict[str, int] = field(default_factory=dict)  # address of each variable in shared memory
    shared_bytes: int = 0


class Kernel:
    """A kernel of a module.

    Attributes:
        threads: of a block, as the kernel demands or at most allows; None if it says neither.
        external: names of the variables in shared memory whose size the launch decides.
    """

    def __init__(self, name: str, parameters: str, directives: str, body: str, outside: str) -> None:
        self.name = name
        self.parameters = _parameters(parameters)
        self.text = body
        found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
        self.threads = int(found[1]) if found else None
        self._outside = outside

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)

    @cached_property
    def body(self) -> Body:
        return _Reader(self._outside, self.text).body

    @cached_property
    def external(self) -> list[str]:
        return re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]\s*;", self._outside)

    def with_text(self, text: str) -> Kernel:
        """Return a copy with another body."""
        other = object.__new__(Kernel)
        other.name, other.parameters, other.threads, other._outside = (
            self.name, self.parameters, self.threads, self._outside,
        )  # fmt: skip
        other.text = text
        return other


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")


def kernels_of(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by name."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    found, outside, end = [], [], 0
    for entry in _ENTRY.finditer(text):
        outside.append(text[end : entry.start()])
        end = _closing(text, entry.end())
        found.append((entry, text[entry.end() : end - 1]))
    outside.append(text[end:])
    if not found:
        raise PtxError("the text has no .entry: it is no PTX module with kernels")
    around = "\n".join(re.split(r"\n\s*\.section", part)[0] for part in outside)
    return {entry[1]: Kernel(entry[1], entry[2], entry[3], body, around) for entry, body in found}


def _closing(text: str, start: int) -> int:
    """Return the place behind the brace that closes the one before `start`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise PtxError("a kernel's body has no closing brace")


def _parameters(text: str) -> list[Parameter]:
    found, end = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        words = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+.*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.DOTALL
        )
        if words is None or words[2] not in WIDTHS:
            raise PtxError(f"a parameter cannot be read: {declaration!r}")
        width = WIDTHS[words[2]]
        size, align = (width * int(words[4]) if words[4] else width), int(words[1] or width)
        end = -(-end // align) * align
        found.append(Parameter(words[3], end, size, align))
        end += size
    return found


_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$.%]+):|(?P<line>\.(?:loc|file)\b[^\n]*)"
    r"|(?P<statement>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);|(?P<end>\Z))"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_NUMBER = re.compile(r"(-?)(?:0[fFdD]([0-9a-fA-F]+)|(0[xX][0-9a-fA-F]+|\d+)U?)$")
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]$|%(?:laneid|warpid)$")


class _Scope:
    """Registers that are declared between two braces. Other scopes may use the same names."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        self.single: dict[str, int] = {}  # name: bytes
        self.families: dict[str, int] = {}  # %r of %r<12>: bytes

    def bytes_of(self, name: str) -> int | None:
        if name in self.single:
            return self.single[name]
        return self.families.get(name.rstrip("0123456789"))


class _Reader:
    def __init__(self, outside: str, text: str) -> None:
        self.body = Body()
        self._scopes = [_Scope("")]
        self._count = 0
        for declaration in re.findall(r"(?<!\.extern )\.shared\s[^;]*;", outside):
            if "[]" not in declaration:
                self._shared(declaration.rstrip(";"))
        for kind, words in self._statements(text):
            self._read(kind, words)

    @staticmethod
    def _statements(text: str) -> Iterator[tuple[str, str]]:
        place = 0
        while True:
            found = _STATEMENT.match(text, place)
            if found is None or found.lastgroup is None:
                raise PtxError(f"a statement cannot be read: {text[place : place + 80].strip()!r}")
            if found.lastgroup == "end":
                return
            place = found.end()
            yield found.lastgroup, found[found.lastgroup].strip()

    def _read(self, kind: str, words: str) -> None:
        if kind == "open":
            self._count += 1
            self._scopes.append(_Scope(f"@{self._count}"))
        elif kind == "close":
            self._scopes.pop()
        elif kind == "label":
            self.body.labels[words] = len(self.body.instructions)
        elif words.startswith(".reg"):
            self._registers(words)
        elif words.startswith(".shared"):
            self._shared(words)
        elif kind == "statement" and not words.startswith(".pragma"):
            self.body.instructions.append(self._instruction(words))

    def _registers(self, words: str) -> None:
        _, kind, names = words.split(None, 2)
        if kind[1:] not in WIDTHS:
            raise PtxError(f"registers of an unknown type: {words!r}")
        for name in re.split(r"\s*,\s*", names.strip()):
            family = re.match(r"(.+)<\d+>$", name)
            into = self._scopes[-1].families if family else self._scopes[-1].single
            into[family[1] if family else name] = WIDTHS[kind[1:]]

    def _shared(self, words: str) -> None:
        found = re.match(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", words)
        if found is None:
            raise PtxError(f"a variable in shared memory cannot be read: {words!r}")
        width = WIDTHS[found[2]]
        align = int(found[1] or width)
        start = -(-self.body.shared_bytes // align) * align
        self.body.shared[found[3]] = start
        self.body.shared_bytes = start + width * int(found[4] or 1)

    def _instruction(self, words: str) -> Instruction:
        text = " ".join(words.split())
        guard, unless = None, False
        if words.startswith("@"):
            name, words = words[1:].split(None, 1)
            unless = name.startswith("!")
            found = self._operand(name.lstrip("!"))
            if not isinstance(found, Register):
                raise PtxError(f"a guard that is no register: {text!r}")
            guard = found
        opcode, rest = (*words.split(None, 1), "")[:2]
        operands: list[Operand] = []
        for operand in _OPERAND.findall(rest):
            parts = operand.split("|") if operand[0] not in "{[" else [operand]
            operands += [self._operand(part.strip()) for part in parts]
        return Instruction(opcode, tuple(operands), guard, unless, text)

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(part.strip()) for part in text[1:-1].split(",")))
        if text[0] == "[":
            found = _ADDRESS.match(text)
            if found is None:
                raise PtxError(f"an address cannot be read: {text!r}")
            base = self._operand(found[1])
            assert isinstance(base, Register | Immediate | Symbol)
            return Address(base, int(found[2] or "0", 0))
        if text[0] == "!":
            operand = self._operand(text[1:])
            assert isinstance(operand, Register)
            return Negated(operand)
        number = _NUMBER.match(text)
        if number:
            if number[2]:
                return Immediate(int(number[2], 16), is_float=True)
            value = int(number[3], 0)
            return Immediate(-value if number[1] else value)
        if _SPECIAL.match(text):
            return Symbol(text)
        for scope in reversed(self._scopes):
            width = scope.bytes_of(text)
            if width is not None:
                self.body.registers[text + scope.suffix] = width
                return Register(text + scope.suffix)
        return Symbol(text)
