"""Telling gradients that wait to be used from those that the last update has used, for step(closure).

torch's convention leaves the last update's gradients in place until the closure clears them. Programs written for the
public SAM package compute gradients before they call step(closure). What makes a gradient new is a backward pass: a
write to it, such as clipping, is none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .sharding import local

# So many parameters, spread over all, are watched: a hook on each would cost more than a small model's kernels. A
# backward pass that reaches none of them is not noticed; step(closure) then computes its gradients once more.
WATCHED = 4


class BackwardWatch:
    """Notices backward passes that reach an optimizer's parameters.

    Args:
        every: True watches all of them instead of WATCHED, for a step or two.

    Attributes:
        ran: True if there was one since it was set to False.
    """

    def __init__(self, params: Iterable[Tensor], *, every: bool = False) -> None:
        self.ran = False
        self._handles: list[Any] = []
        ready = (p for p in params if not is_lazy(p))
        trainable = [p for p in ready if p.requires_grad and p.is_leaf and not p.is_inference()]
        self._params = trainable[:: 1 if every else len(trainable) // WATCHED + 1]
        watch = weakref.ref(self)

        def note(_: Tensor) -> None:
            found = watch()
            if found is not None:
                found.ran = True

        for p in self._params:
            self._handles.append(p.register_post_accumulate_grad_hook(note))

    def __del__(self) -> None:
        for handle in self._handles:
            handle.remove()

    def is_for(self, params: Iterable[Tensor]) -> bool:
        """Return True if there are watched parameters and they are among these."""
        return bool(self._params) and {id(p) for p in self._params} <= {id(p) for p in params}


def any_grads(params: Iterable[Tensor]) -> bool:
    """Return True if there are gradients and they are not all cleared in place."""
    present = [local(p.grad) for p in params if p.grad is not None]
    # A gradient that was never written to is as backward() made it; of others only the values tell.
    return any(g._version == 0 or bool(torch.any(g)) for g in present)
