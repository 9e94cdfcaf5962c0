"""What a training loop does wrong without anybody seeing it, told in words."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PlainStepWarning(UserWarning):
    """step() was the base optimizer's plain step where SAM's was probably meant."""


def warn_of_plain_step(name: str, base: str) -> None:
    """Warn, at the user's own line, that nothing was perturbed."""
    warnings.warn(
        f"step() without first_step() is a plain {base} step: this loop trains without {name}. Call first_step() after "
        "the first backward() and second_step() after the second, or step(closure), or fused_sam.training.sam_step(). "
        "Where plain steps are meant, ask `optimizer.needs_second_pass` before them, or pass rho=0",
        PlainStepWarning,
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """stacklevel of the first caller outside of this package and torch."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_sam", "torch"):
        level, frame = level + 1, frame.f_back
    return level
