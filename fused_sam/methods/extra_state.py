"""Methods with one more vector in the state, such as an average of gradients.

The vector begins with an update. Where only the device knows whether that update was skipped, the host asks it before
the next step, once; a vector that a skipped update began is taken out again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fused_sam.backends.contract import SKIP
from fused_sam.engine.plan import Plan
from fused_sam.engine.vectors import Vector, state_vector
from fused_sam.sam import SAM


class Remembering(SAM):
    """SAM with state under the name `_memory`: of the weights' shape, fp32 (fp64 for fp64 weights)."""

    _memory: ClassVar[str]
    _begun: tuple[list[Tensor], Tensor] | None = None  # whose memory the last update began, and whether it was skipped

    def _remembers(self) -> bool:
        """Whether any weight has a memory."""
        self._settle()
        return any(self._memory in entry for entry in self.state.values())

    def _recalled(self, plan: Plan, like: Vector) -> list[Tensor | None]:
        """The memory of the parameters that have a tensor in `like`, None where there is none."""
        self._settle()
        return state_vector(plan, self.state, self._memory, like, begin=False)

    def _to_begin(self, plan: Plan, like: Vector) -> list[Tensor | None]:
        """Zeros as memory, in the state, of the parameters that have a tensor in `like` and no memory; None elsewhere.

        To be called in `_updated`, and to be written at once.
        """
        old = self._recalled(plan, like)
        new = [g if v is None else None for v, g in zip(old, like, strict=True)]
        owners = [p for p, g in zip(plan.owners, new, strict=True) if g is not None]
        if owners and self._host_numbers is None:
            self._begun = owners, self._status()[SKIP].clone()
        return state_vector(plan, self.state, self._memory, new, begin=True)

    def _settle(self) -> None:
        if self._begun is not None:
            (owners, skip), self._begun = self._begun, None
            if skip:
                for p in owners:
                    self.state[p].pop(self._memory, None)

    def _forget(self) -> None:
        super()._forget()
        self._begun = None

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()
