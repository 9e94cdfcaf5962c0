"""This package holds what a training loop needs around a SAM step: one call for a whole step, and its parts.

    result = sam_step(model, loss_fn, batch, optimizer)
"""

from . import losses
from .batch_norm import frozen_batch_norm
from .closure import paired_closure
from .local import local_perturbation
from .rng import ReplayedRNG
from .scale import set_ascent_grad_scale
from .selection import select_sharp
from .step import StepResult, sam_step

__all__ = [
    "ReplayedRNG",
    "StepResult",
    "frozen_batch_norm",
    "local_perturbation",
    "losses",
    "paired_closure",
    "sam_step",
    "select_sharp",
    "set_ascent_grad_scale",
]
