"""What a pass over the parameters is made of: gradients as they were read, tables with who runs them, and an update."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_sam.backends.contract import NO_ADDRESSES, Backend, Table

from .grad_reader import Reader


@dataclass(eq=False)
class Scan:
    """What the parameters' gradients are at this moment. Short-lived: it keeps the gradients alive."""

    gradients: list[Tensor | None]
    codes: bytes  # ABSENT .. DISAGREEING for each parameter
    addresses: array[int] | None = None  # of the gradients, where they have been read already: then none is absent

    def present(self) -> list[Tensor]:
        if self.addresses is not None:
            return self.gradients  # type: ignore[return-value]
        return [g for g in self.gradients if g is not None]

    def pattern(self) -> bytes:
        """Which parameters have a gradient."""
        return bytes(map(bool, self.codes))


@dataclass(eq=False)
class Job:
    """A table, the backend that runs it, and the parameters its rows are."""

    backend: Backend
    table: Table
    rows: list[int]
    share: float = 1.0  # of the table's sum of squares in the global one

    def attach(self, scan: Scan) -> None:
        table, gradients, addresses = self.table, scan.gradients, scan.addresses
        if len(self.rows) != len(gradients):
            gradients = [gradients[i] for i in self.rows]
            addresses = None if addresses is None else array("q", [addresses[i] for i in self.rows])
        table.gradients = gradients  # type: ignore[assignment]
        if table.agreeing:
            table.gradient_addresses = addresses or array("q", [g.data_ptr() for g in gradients])  # type: ignore[union-attr]

    def detach(self) -> None:
        self.table.gradients = []
        self.table.gradient_addresses = NO_ADDRESSES


class attached:  # noqa: N801  # a context manager, and twice as fast as a generator's
    """Let the tables have the gradients while the primitives run, and no longer, so that they can be freed."""

    def __init__(self, jobs: list[Job], scan: Scan) -> None:
        self._jobs = jobs
        for job in jobs:
            job.attach(scan)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for job in self._jobs:
            job.detach()


@dataclass(eq=False)
class Update:
    """The jobs of one update, and the optimizer state that their tables point to."""

    perturbed: list[Job]  # what it undoes
    jobs: list[Job] = field(default_factory=list)
    restore: list[Job] = field(default_factory=list)  # perturbed, and without a gradient to be updated with
    new: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)  # weight, name, value to enter the state
    entries: list[dict[str, Any]] = field(default_factory=list)  # the state of each weight that has some ...
    held: dict[str, list[Tensor | None]] = field(default_factory=dict)  # ... and by name what was found in each
    all_entries: list[dict[str, Any]] = field(default_factory=list)
    idle_steps: list[Tensor] = field(default_factory=list)  # Adam's of empty weights, which no primitive counts
    spent: bool = False  # what it was to begin has begun: its tables must not begin that once more

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """The update has happened: state that it began is part of the optimizer's now."""
        for p, name, value in self.new:
            state[p][name] = value
            self.spent = True

    def stands_on(self, state: dict[Tensor, dict[str, Any]], reader: Reader) -> bool:
        """Whether the state still holds the tensors that the tables point to, and none where they begin one."""
        return (
            not self.spent
            and reader.unchanged(state, self.all_entries, self.entries, tuple(self.held), list(self.held.values()))
            and not any(name in state.get(p, ()) for p, name, _ in self.new)
        )
