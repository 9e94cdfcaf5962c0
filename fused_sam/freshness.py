"""Telling gradients that wait to be used from those that the last update has used, for step(closure).

torch's convention leaves the last update's gradients in place until the closure clears them; programs written for the
public SAM package compute gradients before they call step(closure). A used gradient carries its version at the time:
backward() makes a new tensor or adds to the old one, which raises the version.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .reader import Reader

_MARK = "_fused_sam_used_at_version"


def mark_used(gradients: list[Tensor | None], reader: Reader) -> None:
    reader.mark(gradients, _MARK)


def fresh_gradients(params: Iterable[Tensor]) -> bool:
    """Whether any parameter has a gradient that no update has used yet."""
    changed = []
    for p in params:
        g = p.grad
        if g is None:
            continue
        mark = getattr(g, _MARK, None)
        if mark is None:
            return True
        if mark != g._version:
            changed.append(g)
    # Written to since: added to by backward(), or cleared in place by zero_grad(set_to_none=False).
    return any(bool(g.any()) for g in changed)
