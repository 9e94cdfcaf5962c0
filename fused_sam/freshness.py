"""Telling gradients that wait to be used from those that the last update has used, for step(closure).

torch's convention leaves the last update's gradients in place until the closure clears them; programs written for the
public SAM package compute gradients before they call step(closure). An update marks some of the gradients it used with
their version: backward() makes a new tensor, which has no mark, or adds to the old one, which raises its version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

_MARK = "_fused_sam_used_at_version"

# Gradients that carry a mark, spread over all: one that is left unchanged shows that nobody cleared them, and marking
# thousands would cost more than a small model's kernels.
_MARKS = 8


def mark_used(gradients: Sequence[Tensor | None]) -> None:
    for g in gradients[:: max(1, len(gradients) // _MARKS)]:
        if g is not None:
            setattr(g, _MARK, g._version)


def fresh_gradients(params: Iterable[Tensor]) -> bool:
    """Whether there are gradients, and none of them is left from the last update."""
    present = [p.grad for p in params if p.grad is not None]
    written = False
    for g in present:
        mark = getattr(g, _MARK, None)
        if mark == g._version:
            return False
        written = written or mark is not None
    # Marked and written to since: added to by backward(), or cleared in place by zero_grad(set_to_none=False).
    return any(bool(g.any()) for g in present) if written else bool(present)
