"""Telling gradients that wait to be used from those that the last update has used, for step(closure).

torch's convention leaves the last update's gradients in place until the closure clears them. Programs written for the
public SAM package compute gradients before they call step(closure). An update marks some of the gradients it used with
their version: backward() makes a new tensor, which has no mark, or adds to the old one, which raises its version.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .sharding import local

MARK = "_fused_sam_used_at_version"

# So many gradients carry a mark, spread over all. One that is unchanged shows that nobody cleared them, and marking
# thousands would cost more than a small model's kernels.
MARKED = 4


def has_new_grads(params: Iterable[Tensor]) -> bool:
    """Return True if there are gradients, none is left from the last update, and not all are cleared in place."""
    present = [local(p.grad) for p in params if p.grad is not None]
    if any(getattr(g, MARK, -1) >= g._version for g in present):  # greater: a deep copy, which counts from 0
        return False
    # A gradient that was written to since it was made has been added to by backward(), or cleared by
    # zero_grad(set_to_none=False): only its values tell. One that was never written to is as backward() made it.
    return any(g._version == 0 or bool(g.any()) for g in present)
