"""Vectors over all parameters, as methods use them: TensorVector, and combinations of two.

fused_sam/step.py gives them to methods and exports them. Numbers are 0-dim tensors on the device or Python numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_sam.backends.contract import XX, XY, YY, arithmetic_dtype

from . import pairs
from .plan import Plan
from .sharding import like

Number = Tensor | float


class Owner(Protocol):
    """What a vector needs of the step that it belongs to: fused_sam.step.Step."""

    _phase: str
    _needed_scale: bool

    @property
    def groups(self) -> list[dict[str, Any]]: ...

    @property
    def _plan(self) -> Plan: ...

    def _where(self, hook: str = "") -> str:
        """Return the class and the hook, for errors."""

    def _writable(self, vector: TensorVector, other: list[Tensor | None], what: str) -> tuple[Any, bool]:
        """Return the status if a skipped step must not write the vector, and True if it is known to be skipped."""

    def _wrote(self, vector: TensorVector) -> None:
        """Note that the vector was written."""

    def _skip_unless(self, finite: Tensor) -> None:
        """Skip this step unless `finite` is True."""


class Products(NamedTuple):
    """Sums over two vectors: 0-dim tensors on the device, fp64 on the CPU, fp32 elsewhere."""

    xy: Tensor
    xx: Tensor
    yy: Tensor


class TensorVector:
    """A vector over all parameters: one tensor per parameter, or None where it has none, which counts as zero.

    Operations run as one kernel launch over all tensors. Those that end in an underscore write in place and return the
    vector. Vectors of one step can be combined; their values count without the loss scale.
    """

    def __init__(
        self, step: Owner, tensors: list[Tensor | None], scale: Number | None = 1.0, role: str = "", name: str = ""
    ) -> None:
        self.name = name  # of a state; "" otherwise
        self._step = step
        self._tensors = tensors
        self._scale = scale  # tensors = vector * scale; None if the scale is not known
        self._role = role
        self._square: tuple[int, Tensor] | None = None  # the count of writes at that time, and <tensors, tensors>
        self._writes = 0
        self._base = self  # of a part, the whole vector
        self._members: list[bool] | None = None  # of a part, which parameters are in it

    # ---- reading --------------------------------------------------------------------------------------------

    def products(self, other: TensorVector) -> Products:
        """Return <x, y>, ||x||^2, ||y||^2 of x = self and y = other, over parameters that both have, in one launch."""
        self._check_other(other, "products()")
        sums = pairs.dot(self._step._plan, self._tensors, other._tensors)
        if self._step._phase == "descent":
            # A factor made of an infinite norm may be 0, and would hide that the gradient is not finite.
            self._step._skip_unless(sums.isfinite().all())
        s, t = self._known_scale(), other._known_scale()
        if self._pattern() == other._pattern():
            self._square, other._square = (self._base._writes, sums[XX]), (other._base._writes, sums[YY])
        return Products(
            over(sums[XY], times(s, t)), over(sums[XX], times(s, s)), over(sums[YY], times(t, t))
        )

    def dot(self, other: TensorVector) -> Tensor:
        """Return <self, other>, summed over all parameters (of all processes): 0-dim, fp64 on the CPU, fp32 elsewhere.

        The launch gives both squares as well: `x.dot(x)` and `y.norm()` read no memory after `x.dot(y)`.
        """
        if other is self and self._square is not None and self._square[0] == self._base._writes:
            scale = self._known_scale()
            return over(self._square[1], times(scale, scale))
        return self.products(other).xy

    def norm(self) -> Tensor:
        """Return the global L2 norm: 0-dim, fp64 on the CPU, fp32 elsewhere."""
        return self.dot(self).sqrt()

    @property
    def empty(self) -> bool:
        """True if no parameter has a tensor, such as a state that has not begun."""
        return all(t is None for t in self._tensors)

    def items(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, tensor) pairs, for operations per tensor. DTensors if the parameters are sharded.

        In `ascent` and `descent` the tensors of `step.grad` may be changed in place; they include the loss scale. All
        other vectors, and `step.grad` in other hooks, yield copies.
        """
        writable = self._role == "" or (self._role == "grad" and self._step._phase in ("ascent", "descent"))
        for p, t in zip(self._step._plan.params, self._tensors, strict=True):
            if t is not None:
                yield p, like(t if writable else t.clone(), p)
                if writable:
                    self._note_write()

    def group(self, k: int) -> TensorVector:
        """Return the part of the vector that belongs to parameter group k, on the same memory."""
        plan = self._step._plan
        n = len(self._step.groups)
        return self._part([j % n == k for j in plan.group_ids])

    def _part(self, members: list[bool]) -> TensorVector:
        if self._members is not None:
            members = [a and b for a, b in zip(members, self._members, strict=True)]
        part = TensorVector(self._step, masked(self._tensors, members), self._scale, self._role, self.name)
        part._base, part._members = self._base, members
        return part

    def within(self, other: TensorVector) -> TensorVector:
        """Return the part of the vector that belongs to parameters for which `other` has a tensor too."""
        self._check_other(other, "within()")
        return self._part([t is not None for t in other._tensors])

    # ---- writing in place -----------------------------------------------------------------------------------

    def scale_(self, a: Number) -> TensorVector:
        """self = a * self."""
        return self._assign([(a, self)], "scale_()")

    def axpby_(self, a: Number, b: Number, other: TensorVector, *, first: Number | None = None) -> TensorVector:
        """self = a * self + b * other.

        Args:
            first: for a state that a parameter does not have yet, self = first * other; None: b * other.
        """
        self._check_other(other, "axpby_()")
        return self._assign([(a, self), (b, other)], "axpby_()", first)

    def lerp_(self, other: TensorVector, weight: float) -> TensorVector:
        """self = (1 - weight) * self + weight * other: an exponential moving average of `other`."""
        self._check_other(other, "lerp_()")
        if self._scale is not other._scale or self._pattern() != other._pattern():
            return self._assign([(1 - weight, self), (weight, other)], "lerp_()")
        status, skipped = self._step._writable(self, other._tensors, "lerp_()")
        if not skipped:
            pairs.ema(self._step._plan, self._tensors, other._tensors, 1 - weight, status)
            self._note_write()
        return self

    def copy_(self, source: TensorVector | Combination) -> TensorVector:
        """self = source, a vector or a sum of two."""
        terms = terms_of(source, "copy_()")
        for _, x in terms:
            self._check_other(x, "copy_()")
        return self._assign(terms, "copy_()")

    def zeros_like(self) -> TensorVector:
        """Return a new vector of zeros with the same tensors present, for this step alone."""
        zeros = [None if t is None else torch.zeros_like(t, dtype=arithmetic_dtype(t.dtype)) for t in self._tensors]
        return TensorVector(self._step, zeros)

    # ---- combinations, which are read by what they are assigned to --------------------------------------------

    def __mul__(self, a: Number) -> Combination:
        return Combination([(a, self)])

    __rmul__ = __mul__

    def __truediv__(self, a: Number) -> Combination:
        return Combination([(1 / a, self)])

    def __neg__(self) -> Combination:
        return Combination([(-1.0, self)])

    def __add__(self, other: TensorVector | Combination) -> Combination:
        return Combination([(1.0, self)]) + other

    def __sub__(self, other: TensorVector | Combination) -> Combination:
        return Combination([(1.0, self)]) - other

    def __repr__(self) -> str:
        present = sum(t is not None for t in self._tensors)
        return f"TensorVector({self._role or 'temporary'}, {present} of {len(self._tensors)} parameters)"

    # ---- within ---------------------------------------------------------------------------------------------

    def _pattern(self) -> list[bool]:
        return [t is None for t in self._tensors]

    def _known_scale(self) -> Number:
        if self._scale is None:
            self._step._needed_scale = True  # found out by the update, if there is a GradScaler
            return 1.0
        return self._scale

    def _check_other(self, other: Any, what: str) -> None:
        if not isinstance(other, TensorVector):
            raise TypeError(
                f"{self._step._where()}: TensorVector.{what} takes a vector of this step, such as step.grad, "
                f"not {type(other).__name__}"
            )
        if len(other._tensors) != len(self._tensors):
            raise ValueError(
                f"{self._step._where()}: the vectors have {len(self._tensors)} and {len(other._tensors)} parameters; "
                "take both from the same step"
            )

    def _note_write(self) -> None:
        self._base._writes += 1
        self._step._wrote(self)

    def _assign(
        self, terms: list[tuple[Number, TensorVector]], what: str, first: Number | None = None
    ) -> TensorVector:
        """self = the sum of up to two terms, in which a missing tensor counts as zero."""
        terms = Combination(terms).joined()
        if len(terms) > 2:
            raise ValueError(f"{self._step._where()}: {what} takes two vectors; add the third by axpby_()")
        old = list(self._tensors)
        status, skipped = self._step._writable(self, union([x._tensors for _, x in terms]), what)
        if skipped:
            return self
        factors = [c if x is self else times(c, self._ratio(x)) for c, x in terms]
        columns = [old if x is self else x._tensors for _, x in terms]
        out = self._tensors
        begun = [o is None and t is not None for o, t in zip(old, out, strict=True)]
        plan = self._step._plan
        if first is not None and any(begun):
            (_, _), (_, other) = terms
            source, target = masked(other._tensors, begun), masked(out, begun)
            pairs.axpby(plan, source, source, target, times(first, self._ratio(other)), 0.0, status)
            out = masked(out, [not new for new in begun])
        present = [[t is not None and o is not None for t, o in zip(column, out, strict=True)] for column in columns]
        (x, a), (y, b) = (columns[0], factors[0]), (columns[-1], factors[-1] if len(terms) == 2 else 0.0)
        both = [i and j for i, j in zip(present[0], present[-1], strict=True)]
        if any(both):
            pairs.axpby(plan, masked(x, both), masked(y, both), out, a, b, status)
        if not all(both):
            for k, (column, factor) in enumerate(zip(columns, factors, strict=True)):
                alone = [i and not j for i, j in zip(present[k], both, strict=True)]
                if any(alone) and not (column is old and is_one(factor)):
                    only = masked(column, alone)
                    pairs.axpby(plan, only, only, out, factor, 0.0, status)
            nowhere = [
                o is not None and not any(found) for o, found in zip(out, zip(*present, strict=True), strict=True)
            ]
            if any(nowhere):
                rest = masked(out, nowhere)
                pairs.axpby(plan, rest, rest, rest, 0.0, 0.0, status)
        self._note_write()
        return self

    def _ratio(self, other: TensorVector) -> Number:
        """Return what other's tensors are multiplied by to have the scale of this vector's."""
        return 1.0 if self._scale is other._scale else over(self._known_scale(), other._known_scale())


def masked(tensors: list[Tensor | None], members: list[bool]) -> list[Tensor | None]:
    """Return the tensors that are members, and None for the others."""
    return [t if member else None for t, member in zip(tensors, members, strict=True)]


def union(columns: list[list[Tensor | None]]) -> list[Tensor | None]:
    """Return, per parameter, the first tensor that one of the columns has."""
    return [next((t for t in row if t is not None), None) for row in zip(*columns, strict=True)]


class Combination:
    """A sum of up to two vectors times numbers, such as `a * x + b * y`: assigned to something that reads it."""

    def __init__(self, terms: list[tuple[Number, TensorVector]]) -> None:
        self.terms = terms

    def joined(self) -> list[tuple[Number, TensorVector]]:
        """Return the terms, each vector once."""
        joined: dict[int, tuple[Number, TensorVector]] = {}
        for c, x in self.terms:
            joined[id(x)] = (joined[id(x)][0] + c, x) if id(x) in joined else (c, x)
        return list(joined.values())

    def __mul__(self, a: Number) -> Combination:
        return Combination([(times(a, c), x) for c, x in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, a: Number) -> Combination:
        return self * (1 / a)

    def __neg__(self) -> Combination:
        return self * -1.0

    def __add__(self, other: TensorVector | Combination) -> Combination:
        return Combination(Combination([*self.terms, *terms_of(other, "+")]).joined())

    __radd__ = __add__

    def __sub__(self, other: TensorVector | Combination) -> Combination:
        return self + _negative(other)


# ---- numbers on the host or on the device: a factor that is known to be 1 takes no operation -----------------------


def is_one(a: Number) -> bool:
    """Return True for a 1 on the host."""
    return not isinstance(a, Tensor) and a == 1


def times(a: Number, b: Number) -> Number:
    """Return a * b."""
    return b if is_one(a) else a if is_one(b) else a * b


def over(a: Any, b: Number) -> Any:
    """Return a / b."""
    return a if is_one(b) else a / b


def terms_of(value: Any, what: str) -> list[tuple[Number, TensorVector]]:
    """Return a vector, or a combination, as a list of (factor, vector)."""
    if isinstance(value, TensorVector):
        return [(1.0, value)]
    if isinstance(value, Combination):
        return value.terms
    raise TypeError(f"{what} takes a vector of the step, or a combination such as a * x + b * y, not {value!r}")


def _negative(value: TensorVector | Combination) -> Combination:
    return Combination([(-c, x) for c, x in terms_of(value, "-")])
