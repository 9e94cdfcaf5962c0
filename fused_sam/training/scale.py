"""Methods and schedules that compare gradients of different steps need the loss scale of the first gradients."""

from __future__ import annotations

from typing import Any

import torch

from fused_sam.sam import SAM


def set_ascent_grad_scale(optimizer: SAM, scaler: Any) -> None:
    """Set optimizer.ascent_grad_scale from a GradScaler, if there is one and the optimizer needs its scale.

    Call it in each step before the first pass ends, because the update forgets the scale. F-SAM needs it because it
    averages gradients, and AE-SAM's rule because it compares their norms. The scale stays on the device.

    Args:
        scaler: a torch.amp.GradScaler. None: nothing happens.
    """
    if scaler is not None and optimizer.needs_grad_scale:
        optimizer.ascent_grad_scale = scaler.scale(torch.ones((), device=optimizer.stepper.device()))
