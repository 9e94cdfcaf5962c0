"""Telling autograd of weights that a kernel wrote through their address."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Raise the version counters, so that autograd notices a graph that had saved the old values."""
    try:
        increment_version(tensors)
    except TypeError:  # an older torch takes one tensor at a time
        for t in tensors:
            increment_version(t)
