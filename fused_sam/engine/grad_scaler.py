"""GradScaler.unscale_() reports to a SAM optimizer, which must distinguish the gradients that it has unscaled.

GradScaler unscales once per step and optimizer, and SAM has two gradients per step. Without a report, unscale_() before
first_step() looks the same in step() as unscale_() after the second backward(). GradScaler.scale() reports that losses
are scaled at all, for a warning.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.amp import GradScaler

_REPORTS = "_reports_to_fused_sam"


class Scaling:
    """The GradScaler that has scaled a loss last, in this process.

    Attributes:
        calls: how often one has.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._scaler: Callable[[], Any] = lambda: None

    def note(self, scaler: Any) -> None:
        """Note that a GradScaler scales a loss."""
        self.calls, self._scaler = self.calls + 1, weakref.ref(scaler)

    def scale(self) -> float | None:
        """Return its scale, which waits for the device; None if it is gone."""
        scaler = self._scaler()
        return None if scaler is None else float(scaler.get_scale())


scaling = Scaling()


def report_unscaling() -> None:
    """Make unscale_() of GradScaler and of its subclasses call the optimizer's `note_unscaled`, if it has one.

    Their scale() notes that a loss was scaled.
    """
    for cls in (GradScaler, *GradScaler.__subclasses__()):
        unscale = vars(cls).get("unscale_")
        if unscale is not None and not hasattr(unscale, _REPORTS):
            setattr(cls, "unscale_", _reporting(unscale))  # noqa: B010
        scale = vars(cls).get("scale")
        if scale is not None and not hasattr(scale, _REPORTS):
            setattr(cls, "scale", _noting(scale))  # noqa: B010


def _noting(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def noting(self: Any, outputs: Any) -> Any:
        if self.is_enabled():
            scaling.note(self)
        return scale(self, outputs)

    setattr(noting, _REPORTS, True)
    return noting


def _reporting(unscale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(unscale)
    def unscale_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = unscale(self, optimizer, *args, **kwargs)
        note = getattr(optimizer, "note_unscaled", None)
        if note is not None and self.is_enabled():
            note(self.scale(torch.ones((), device=optimizer.stepper.device())))
        return result

    setattr(unscale_, _REPORTS, True)
    return unscale_
