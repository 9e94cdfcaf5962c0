"""GCSAM: the perturbation follows the centralised gradient.

    c(g) = g - mean of g over dims 1.. , for tensors of more than one dimension;  e = rho c(g) / ||c(g)||
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam.sam import SAM
from fused_sam.step import Step, TensorVector, option


class GCSAM(SAM):
    """Gradient Centralized SAM: Hassan, Vakanski, Zhang and Xian, arXiv 2501.11584.

    Use it for convolutional networks with noisy gradients. Published: above SAM on CIFAR-10 and on medical images.
    The centralisation is that of Yong et al., ECCV 2020, arXiv 2004.01461.

    Args:
        length: "centralised": e is divided by ||c(g)||, as in the paper's equation. "gradient": by ||g||, so that e is
            shorter than rho, as in the authors' program. Not with adaptive=True.
        centralise_descent: True: the update takes c(g_s), as in the paper's equation, in steps that perturb. False:
            g_s, as in the authors' program.
        Others: as SAM.

    The first gradients are changed in place, and with centralise_descent the second ones too. With length="gradient" a
    GradScaler's scale is needed where first_step() is called by hand: first_step(grad_scale=scaler.get_scale()).

    Raises:
        ValueError: length is neither of the two, or length="gradient" with adaptive=True; as SAM.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 56: centralising 12, norm 4, perturb 16, check 4, update 20 | 4, and 2 per matrix or kernel | 2 |
    | length="gradient" | 16 more | 2 more per group | |
    | centralise_descent | 12 more | 2 more per matrix or kernel | |
    """

    OPTIONS = {
        "length": option("centralised", choices=("centralised", "gradient"), help="what e is divided by"),
        "centralise_descent": option(False, help="centralise the gradient of the update too"),
    }
    length: str
    centralise_descent: bool
    compares_passes = False
    shortened: Any = None
    """||c(g)|| / ||g|| between `ascent` and `radius`, with length="gradient"."""

    @property
    def needs_grad_scale(self) -> bool:
        """True if `ascent_grad_scale` must be set under a GradScaler: with length="gradient", or for the schedule."""
        by_schedule = self.schedule is not None and self.schedule.needs_grad_scale
        return self.length == "gradient" or self.decay_in_ascent or by_schedule

    def ascent(self, step: Step) -> None:
        for k, group in enumerate(step.groups):
            if self.length == "gradient" and group["adaptive"]:
                raise ValueError(f'GCSAM with length="gradient" cannot be adaptive: set adaptive=False in group {k}')
        vectors = [step.grad.group(k) for k, group in enumerate(step.groups) if group["perturb"]]
        before = square_of(vectors) if self.length == "gradient" else None
        for vector in vectors:
            centralise(vector)
        self.shortened = None
        if before is not None:
            self.shortened = torch.where(before > 0, square_of(vectors) / before, 0.0).sqrt()

    def radius(self, step: Step) -> Any:
        shortened, self.shortened = self.shortened, None
        return None if shortened is None else step.rho * shortened

    def descent(self, step: Step) -> None:
        if self.centralise_descent and step.perturbed:
            centralise(step.grad)


def square_of(vectors: list[TensorVector]) -> Tensor:
    """Return the sum of the vectors' squares: 0-dim."""
    return torch.stack([x.dot(x) for x in vectors]).sum()


def centralise(vector: TensorVector) -> None:
    """Subtract from each tensor of more than one dimension its mean over all dimensions but the first."""
    for _, g in vector.items():
        if g.dim() > 1 and g.numel():
            wide = torch.promote_types(g.dtype, torch.float32)
            total = g.sum(dim=tuple(range(1, g.dim())), keepdim=True, dtype=wide)
            g.sub_(total / (g.numel() // g.shape[0]))  # gloo has no mean over processes
