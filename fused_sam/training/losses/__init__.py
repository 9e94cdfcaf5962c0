"""Losses that differ between the two passes of a step: docs/losses.md.

    loss = losses.OutputBiasForgetting(optimizer)         # perturbs to forget what the outputs are biased to
    loss = losses.Functional(optimizer)                   # keeps the loss's derivative of the unperturbed outputs
    loss = losses.SelfDistillation(optimizer)             # the unperturbed outputs teach the perturbed weights
    sam_step(model, loss, (inputs, targets), optimizer)

    losses.ReleasedSADT(optimizer).step(model, (inputs, targets))     # self-distillation as its authors released it
"""

from fused_sam.training.per_pass import PerPassLoss

from .forgetting import OutputBiasForgetting
from .functional import Functional
from .released_sadt import ReleasedSADT
from .self_distillation import SelfDistillation

__all__ = ["Functional", "OutputBiasForgetting", "PerPassLoss", "ReleasedSADT", "SelfDistillation"]
