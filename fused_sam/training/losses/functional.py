"""Functional-SAM: the perturbation changes the model's function in the gradient, and not the loss's derivative.

    G = dL/dz at z(w), constant;  second pass: the gradient of <z(w + e), G>
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sam.training.per_pass import PerPassLoss, with_value


class Functional(PerPassLoss):
    """Singh et al., "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025.

    arXiv 2502.02407. Use it for language models, where plain SAM is published as no better than AdamW. SAM's gradient
    at w + e is the Jacobian of the outputs there times the loss's derivative there. Functional-SAM takes the Jacobian
    at w + e and the derivative at w. Published: below the validation loss of AdamW and SAM with as many steps, from 24
    million to 1.2 billion parameters.

        loss = losses.Functional(optimizer)
        sam_step(model, loss, (inputs, targets), optimizer)

    Args:
        optimizer, criterion, forward: as PerPassLoss.

    The first pass is the ordinary one. Both passes have the value of the ordinary loss, at w and at w + e. A copy of
    the outputs is kept from the first to the second pass: 4 bytes per output.
    """

    def second(self, outputs: Tensor, targets: Tensor, earlier: Tensor | None) -> Tensor:
        assert earlier is not None
        earlier.requires_grad_()
        (derivative,) = torch.autograd.grad(self.criterion(earlier, targets), earlier)
        return with_value((outputs * derivative).sum(), self.criterion(outputs.detach(), targets))
