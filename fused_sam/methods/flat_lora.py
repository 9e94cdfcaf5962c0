"""Flat-LoRA: adapters are trained while their frozen base weights carry noise; one pass per step.

    W~_ij = W_ij + N(0, (rho_t ||W_i|| / sqrt(n))^2) for frozen W,  rho_t = rho (1 - cos(pi t / T)) / 2
    adapters = BASE(adapters, grad L(adapters; W~)),  W_i a row of n elements
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.engine.noise import RowNoise, is_frozen_matrix
from fused_sam.engine.stepper import Stepper
from fused_sam.step import REQUIRED, Step, option

from .displaced import DisplacedSAM


class FlatLoRA(DisplacedSAM):
    """Li et al., "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", ICML 2025, arXiv 2409.14396.

    Use it for LoRA, and for other adapters of frozen weights, at the price of one pass. Published: above LoRA in and
    out of domain, on language and image models.

        optimizer = fused_sam.FlatLoRA(model.parameters(), torch.optim.AdamW, total=steps, rho=0.05, lr=1e-3)

    Args:
        params: the adapters and the frozen weights together, such as all of model.parameters(). Parameters with
            requires_grad=False and two dimensions or more get noise, except in groups with perturb=False: embeddings
            that shall stay as they are. Everything that is trained is updated, and not displaced.
        base_optimizer: AdamW in the paper.
        total: T, the number of steps, after which rho_t stays rho.
        rho: the noise's standard deviation, relative to a row's root mean square; 0.05 in the authors' program.
        Others: as SAM, without adaptive.

    The noise is a function of `seed` and the number of the step, the same on every backend and process. The frozen
    weights are restored bit for bit by the update. Used as MomentumSAM is: backward(), step(), eval() before evaluating
    and saving, train() afterwards and after loading.

    Differs from the authors' method: rows are those of W alone, there of the merged W + s B A. There the noise is drawn
    again from its seed and subtracted, which saves the copy of W and restores it but for rounding.

    Raises:
        ValueError: no frozen weight could get noise, adaptive=True, a schedule that reads gradients, decay_in_ascent;
            as SAM.
        TypeError: total is missing, a base optimizer with train() or eval(); as SAM.
        RuntimeError: first_step(), second_step(), step() with clean weights after the first step, or without any frozen
            weight left.

    | per frozen weight, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 32: backup 8, norms of rows 4, adding 12, undo 8; drawing | 36 per tensor | 1 |

    Adapters take the base optimizer's step: 24 with SGD and the check. Memory: a copy of the frozen weights that get
    noise, and their noise one tensor at a time. Drawing takes longer than the rest; a captured CUDA graph repeats it.
    """

    OPTIONS = {"total": option(REQUIRED, low=1, type=int, help="the number of steps over which the noise grows")}
    total: int
    GROUP_STATE = {"noise_step": 0}
    displaced_by = "by noise"

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        super().__init__(params, base_optimizer, *args, **options)
        if not self.any_frozen():
            raise ValueError(
                "FlatLoRA adds noise to frozen weights, and there are none: pass the frozen base weights beside the "
                "adapters, as in FlatLoRA(model.parameters(), ...) after requires_grad_(False), in a group with "
                "perturb=True. To train all weights, use SAM or RandomSAM"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; as SAM's, but it must not be adaptive."""
        super().add_param_group(param_group)
        if self.param_groups[-1]["adaptive"]:
            k = len(self.param_groups) - 1
            del self.param_groups[-1]
            raise ValueError(f"group {k} has adaptive=True, but FlatLoRA scales its noise by rows: leave it out")

    def any_frozen(self) -> bool:
        """Return True if there is a frozen weight that may get noise."""
        params = (p for group in self.param_groups if group["perturb"] for p in group["params"])
        return any(map(is_frozen_matrix, params))

    def make_displacement(self, stepper: Stepper) -> RowNoise:
        return RowNoise(stepper, lambda: int(self.param_groups[0]["noise_step"]), self.growth)

    def growth(self) -> float:
        """Return what rho is multiplied by in the coming step: a cosine from 0 to 1."""
        return (1 - math.cos(math.pi * min(1.0, self.param_groups[0]["noise_step"] / self.total))) / 2

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        if not self.any_frozen():
            raise RuntimeError(
                "FlatLoRA has no frozen weight left to add noise to: freeze the base weights again by "
                "requires_grad_(False), or use another method"
            )
        return super().run_step(closure)

    def updated(self, step: Step) -> None:
        for group in step.groups:
            group["noise_step"] += 1
        super().updated(step)
