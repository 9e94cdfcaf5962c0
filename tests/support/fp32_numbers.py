"""GPU backends on CPU tensors: a status is fp64 there, and their kernels read and write fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fused_sam.backends.contract import Backend, PerturbGroup, Status, Table, VectorPair


class _Fp32Status(Status):
    """An fp32 copy of a status on the CPU, which is fp64."""

    __slots__ = ()

    def __init__(self, wide: Status) -> None:
        self.device, self.host, self.values = wide.device, None, wide.values.float()
        self.address, self.marks_address = self.values.data_ptr(), wide.marks_address


@contextmanager
def _narrow_numbers(table: Table) -> Iterator[None]:
    """Give a table fp32 copies of its numbers per row inside `with`."""
    wide = table.factors, table.unbias
    table.factors, table.unbias = map(_fp32, wide)
    try:
        yield
    finally:
        table.factors, table.unbias = wide


class Fp32Numbers(Backend):
    """A base class in front of a backend. A call narrows the fp64 numbers before, and widens them afterwards."""

    def has_kernels(self, pair: VectorPair) -> bool:
        """Return False for vectors that go to the reference backend, with their fp64 numbers."""
        raise NotImplementedError

    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        narrow = _Fp32Status(status)
        super().accumulate_norm(table, groups, narrow)
        status.values.copy_(narrow.values)

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        narrow = _Fp32Status(status)
        super().finish_norm(narrow, ascent=ascent, keep_skip=keep_skip, eps=eps)
        status.values.copy_(narrow.values)

    def norm(
        self,
        tables: Sequence[Table],
        groups: Sequence[PerturbGroup] | None,
        status: Status,
        *,
        keep_skip: bool,
        eps: float,
    ) -> None:
        narrow = _Fp32Status(status)
        super().norm(tables, groups, narrow, keep_skip=keep_skip, eps=eps)
        status.values.copy_(narrow.values)

    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        with _narrow_numbers(table):
            narrow = sums.float()
            super().squares(table, groups, narrow, weights=weights)
            sums.copy_(narrow)

    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        with _narrow_numbers(table):
            super().perturb(table, groups, _Fp32Status(status))

    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        super().update(table, groups, _Fp32Status(status), _fp32(grad_scale), max_norm)

    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        if not self.has_kernels(pair):
            return super().dot(pair, sums, reset=reset)
        narrow = sums.float()
        super().dot(pair, narrow, reset=reset)
        sums.copy_(narrow)
        return None

    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        if self.has_kernels(pair):
            coefficients = coefficients.float() if isinstance(coefficients, Tensor) else coefficients
            status = None if status is None else _Fp32Status(status)
        super().axpby(pair, out, coefficients, status)


def _fp32(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.float()
