"""This SAM with SGD works one tensor at a time, as the formula says. Fused SAM is timed against it.

    e = rho * g / (||g|| + 1e-12);  g_s = grad L(w + e);  w = SGD(w, g_s)

Foret et al., ICLR 2021, arXiv 2010.01412. Each line is one torch call per tensor, as is common in SAM packages.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class UnfusedSAM(torch.optim.SGD):
    """Adds first_step() and second_step() to torch.optim.SGD. Every weight needs a gradient."""

    def __init__(
        self, params: Iterable[Tensor], rho: float, lr: float, momentum: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.rho = rho
        self._backup: list[Tensor] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Save the weights and perturb them."""
        weights = self._weights()
        norm = torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm()
        scale = self.rho / (norm + 1e-12)
        self._backup = [w.clone() for w in weights]
        for w in weights:
            if w.grad is not None:
                w.add_(w.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and make SGD's step."""
        for w, backup in zip(self._weights(), self._backup, strict=True):
            w.copy_(backup)
        self._backup = []
        self.step()
        if zero_grad:
            self.zero_grad()

    def _weights(self) -> list[Tensor]:
        return [w for group in self.param_groups for w in group["params"]]
