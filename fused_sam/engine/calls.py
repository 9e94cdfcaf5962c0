"""What a pass over the parameters is made of: a snapshot of the gradients, kernel calls, and the plan of an update."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_sam.backends.contract import Backend, Table


@dataclass(eq=False, slots=True)
class GradSnapshot:
    """The parameters' gradients at this moment. Short-lived, because it keeps the gradients alive."""

    grads: list[Tensor | None]
    codes: bytes  # for each parameter, one of plan.ABSENT .. plan.LAYOUT_MISMATCH
    addresses: array[int] | None = None  # of the gradients, if they were read already; 0 where there is none

    def present(self) -> list[Tensor]:
        """Return the gradients without the absent ones."""
        return [g for g in self.grads if g is not None]

    def pattern(self) -> bytes:
        """Return which parameters have a gradient."""
        return bytes(map(bool, self.codes))


@dataclass(eq=False, slots=True)
class KernelCall:
    """A table, the backend that runs it, and the numbers of the parameters in its rows."""

    backend: Backend
    table: Table
    rows: list[int]
    fraction: float = 1.0  # of the table's sum of squares in the global one, see sharding.py


@dataclass(eq=False, slots=True)
class UpdatePlan:
    """The calls of one update, and the optimizer state that their tables point to."""

    perturbed: list[KernelCall]  # what it undoes
    calls: list[KernelCall] = field(default_factory=list)
    restore: list[KernelCall] = field(default_factory=list)  # perturbed parameters that have no gradient now
    # State that the update starts: parameter, name, value.
    new: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)
    # The state of each parameter that has some, and by name what was found in each.
    entries: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, list[Tensor | None]] = field(default_factory=dict)
    all_entries: list[dict[str, Any]] = field(default_factory=list)
    names: tuple[str, ...] = ()  # of `found`
    columns: list[list[Tensor | None]] = field(default_factory=list)  # of `found`
    empty_steps: list[Tensor] = field(default_factory=list)  # Adam's of empty parameters, which are in no table
    spent: bool = False  # True if `new` is in the state: the tables must not start it again

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Put the state that the update has started into the optimizer's."""
        for p, name, value in self.new:
            state[p][name] = value
            self.spent = True
