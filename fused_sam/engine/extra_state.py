"""A method's own vectors in the optimizer's state, such as an average of gradients.

A vector begins with an update. Where only the device knows whether that update was skipped, the host asks it once,
before the next use; a vector that a skipped update began is taken out again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .pairs import Vector
from .plan import Plan

State = dict[Tensor, dict[str, Any]]


class ExtraState:
    """Vectors in the optimizer's state, under names that a method chooses: of the parameters' shape, fp32 (or fp64)."""

    def __init__(self) -> None:
        self._begun: list[tuple[State, str, list[Tensor], Tensor]] = []
        # The rows that this step has begun. They count as absent when a hook that an exception has ended runs again.
        self.begun_now: dict[str, set[int]] = {}

    def find(self, plan: Plan, state: State, name: str) -> list[Tensor | None]:
        """Return the vector of that name: this process's part per parameter, None where there is none."""
        self.settle()
        new = self.begun_now.get(name, ())
        return [None if i in new else plan.state_part(state, i, name, init=False) for i in range(len(plan.params))]

    def begin(
        self, plan: Plan, state: State, name: str, like: Vector, skip: Tensor | None
    ) -> list[Tensor | None]:
        """Return the vector of that name, with zeros put into the state where `like` has a tensor and it has none.

        To be called after the base optimizer's update: a base optimizer takes a state that is not empty for its own.

        Args:
            skip: the update's skip flag if only the device knows it; None: the update was not skipped.
        """
        old = self.find(plan, state, name)
        missing = [v is None and g is not None for v, g in zip(old, like, strict=True)]
        self.begun_now.setdefault(name, set()).update(i for i, new in enumerate(missing) if new)
        if skip is not None and any(missing):
            params = [p for p, new in zip(plan.params, missing, strict=True) if new]
            self._begun.append((state, name, params, skip.clone()))
        return [
            plan.state_part(state, i, name, init=True) if new else v
            for i, (v, new) in enumerate(zip(old, missing, strict=True))
        ]

    def settle(self) -> None:
        """Take out what a skipped update began. Waits for the device only after an update that began something."""
        begun, self._begun = self._begun, []
        for state, name, params, skip in begun:
            if skip:
                for p in params:
                    state[p].pop(name, None)

    def forget(self) -> None:
        """Forget what an update began, because the state was replaced."""
        self._begun = []
