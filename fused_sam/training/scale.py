"""Telling the loss scale to methods and schedules that compare gradients of different steps."""

from __future__ import annotations

from typing import Any

from fused_sam.sam import SAM


def set_ascent_grad_scale(optimizer: SAM, scaler: Any) -> None:
    """Set optimizer.ascent_grad_scale from a GradScaler, where there is one and the optimizer needs it; waits for the device.

    To be called in each step, before its first pass is over; the update forgets it. F-SAM averages gradients, AE-SAM's
    rule compares their norms.
    """
    if scaler is not None and optimizer.needs_grad_scale:
        optimizer.ascent_grad_scale = scaler.get_scale()
