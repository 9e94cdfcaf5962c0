"""GradScaler.unscale_() reports to a SAM optimizer, which must distinguish the gradients that it has unscaled.

GradScaler unscales once per step and optimizer, and SAM has two gradients per step. Without a report, unscale_() before
first_step() looks the same in step() as unscale_() after the second backward().
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.amp import GradScaler

_REPORTS = "_reports_to_fused_sam"


def report_unscaling() -> None:
    """Make unscale_() of GradScaler and of its subclasses call the optimizer's `note_unscaled`, if it has one."""
    for cls in (GradScaler, *GradScaler.__subclasses__()):
        unscale = vars(cls).get("unscale_")
        if unscale is not None and not hasattr(unscale, _REPORTS):
            setattr(cls, "unscale_", _reporting(unscale))  # noqa: B010


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
