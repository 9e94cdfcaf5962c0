"""Errors of the interpreter."""

from __future__ import annotations


class PtxError(Exception):
    """Raised if a kernel does what it must not do, or if its text cannot be read."""


class UnknownOpcodeError(PtxError):
    """Raised for an instruction that the interpreter does not implement."""

    def __init__(self, text: str) -> None:
        super().__init__(f"the PTX interpreter does not implement {text!r}: add it to tests/support/ptx")
