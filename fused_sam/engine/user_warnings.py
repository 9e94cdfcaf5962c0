"""These warnings report mistakes in a training loop that would otherwise go unnoticed."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PlainStepWarning(UserWarning):
    """Warns that step() made a plain step of the base optimizer, although a step of SAM was probably meant."""


class AbandonedStepWarning(UserWarning):
    """Warns that first_step() found perturbed weights, because the step before it was not finished."""


class SelectionWarning(UserWarning):
    """Warns that a step of ESAM by hand has selected no samples, although gamma is below 1."""


class SkippedStepsWarning(UserWarning):
    """Warns that many steps in a row were skipped, because gradients were not finite."""


class NoGradientWarning(UserWarning):
    """Warns that no parameter has had a gradient in the first steps."""


class OptionWarning(UserWarning):
    """Warns of an option of a group that has no effect, and of a rho that is small for its use."""


class SecondBackwardWarning(UserWarning):
    """Warns that no backward pass ran between first_step() and second_step()."""


class LargeRhoWarning(UserWarning):
    """Warns that the perturbed loss stays far above the loss, which does not fall."""


class GradScaleWarning(UserWarning):
    """Warns that an update divides its gradients by another scale than they have."""


def warn(text: str, kind: type[UserWarning]) -> None:
    """Warn at the line of the user's that has led here."""
    warnings.warn(text, kind, stacklevel=_stacklevel_of_user())


def warn_of_abandoned_step() -> None:
    """Warn, at the user's line, that the perturbation of an unfinished step was undone."""
    warn(
        "first_step() found the weights still perturbed: the step before it was not finished. The weights were "
        "restored, but the gradients of this step were computed at the perturbed weights. If a loop skips a batch "
        "after first_step(), call restore() there",
        AbandonedStepWarning,
    )


def warn_of_plain_step(name: str, base: str) -> None:
    """Warn, at the user's line, that nothing was perturbed."""
    warn(
        f"step() without first_step() is a plain {base} step: this loop trains without {name}. Call first_step() after "
        "the first backward() and second_step() after the second, or step(closure), or fused_sam.training.sam_step(). "
        "For plain steps, read `optimizer.needs_second_pass` before them, or pass rho=0",
        PlainStepWarning,
    )


def warn_of_missing_selection(gamma: float) -> None:
    """Warn, at the user's line, that ESAM's second gradient was of all samples."""
    warn(
        f"ESAM (gamma={gamma:g}) updates with the gradient of all samples, because nothing was selected between "
        "first_step() and step(): use fused_sam.training.sam_step, or select by fused_sam.training.select_sharp, or "
        "pass gamma=1",
        SelectionWarning,
    )


def _stacklevel_of_user() -> int:
    """Return the stacklevel of the first caller outside of this package and torch."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_sam", "torch"):
        level, frame = level + 1, frame.f_back
    return level
