"""SAM written out in float64, one weight at a time. It shares no code with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class HandwrittenSAM:
    """SAM (arXiv 2010.01412, eq. 2) or ASAM (arXiv 2102.11600) with the documented update of torch.optim.SGD."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = groups
        self.velocity: dict[int, Tensor] = {}

    def perturb(self) -> None:
        total = 0.0
        for group, p in self._each():
            if p.grad is not None and group.get("perturb", True):
                total += float((self._t(group, p) * p.grad).square().sum())
        norm = total**0.5
        self.saved = {id(p): p.detach().clone() for _, p in self._each()}
        for group, p in self._each():
            if p.grad is not None and group.get("perturb", True) and norm > 0:
                p.data += group.get("rho", 0.05) * self._t(group, p) ** 2 * p.grad / (norm + 1e-12)

    def update(self) -> None:
        for group, p in self._each():
            p.data.copy_(self.saved[id(p)])
            if p.grad is None:
                continue
            d = p.grad.clone()
            if group.get("maximize"):
                d = -d
            d += group.get("weight_decay", 0.0) * p.data
            mu = group.get("momentum", 0.0)
            if mu:
                v = self.velocity.get(id(p))
                v = d.clone() if v is None else mu * v + (1 - group.get("dampening", 0.0)) * d
                self.velocity[id(p)] = v
                d = d + mu * v if group.get("nesterov") else v
            p.data -= group["lr"] * d

    @staticmethod
    def _t(group: dict[str, Any], p: Tensor) -> Tensor | float:
        return p.data.abs() + group.get("eta", 0.0) if group.get("adaptive") else 1.0

    def _each(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.groups for p in group["params"]]
