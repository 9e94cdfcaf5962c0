"""WSAM: sharpness as a term of the loss with a weight of its own.

    L(w) + a (max L(w + e) - L(w)),  a = gamma / (1 - gamma)
    coupled: w = BASE(w, (1 - a) g + a g_s);   decoupled: w = BASE(w, g) - lr a (g_s - g)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.sam import SAM
from fused_sam.step import Step, option


class WSAM(SAM):
    """Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD 2023.

    arXiv 2305.15817, with both forms of the step as in the authors' program. Use it to tune how much flatness counts,
    with one more number. Published: above the base optimizer, and above or level with SAM and its variants on CIFAR,
    ImageNet and label noise.

    Args:
        gamma: from 0 (the base optimizer) over 0.5 (SAM, if coupled) to below 1; 0.9 in the authors' README.
        decouple: True: the sharpness term g_s - g moves the weights after the base step and enters no momentum (the
            paper's choice). False: it is part of the gradient that the base optimizer gets.
        Others: as SAM. max_norm clips g and the sharpness term by one factor, that of g's norm, if decoupled; the
            authors' program clips g and g_s each by its own norm.

    first_step() takes the gradients from the parameters; after a decoupled step p.grad holds g. `update_norm` is of
    what the base optimizer got. Under a GradScaler the combined gradient is checked too. The scaler does not lower its
    scale for a step that is skipped so.

    Raises:
        TypeError, ValueError: gamma out of range; as SAM. stochastic_rounding with decouple=True, which moves the
            weights a second time, by steps that rounding to nearest would lose.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | coupled | 56: norm 4, perturb 16, axpby 12, check 4, update 20 | 5 | 2 |
    | decoupled | 76: norm 4, perturb 16, axpby 12, dot 8, check 4, update 20, axpby 12 | 6, and one per group | 2 |

    Memory on top of SAM's: 4 bytes for g during the second pass.
    """

    OPTIONS = {
        "gamma": option(0.9, low=0, high=1, open_high=True, help="weight of the sharpness term, gamma / (1 - gamma)"),
        "decouple": option(True, help="apply the sharpness term after the base step"),
    }
    gamma: float
    decouple: bool
    keeps_ascent_grad = True
    combines_grads = True

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        if options.get("decouple", True) and options.get("stochastic_rounding"):
            raise ValueError("stochastic_rounding needs decouple=False; with decouple=True use master_weights=True")
        super().__init__(params, base_optimizer, *args, **options)

    def descent(self, step: Step) -> None:
        if not step.perturbed:
            return
        a = self.gamma / (1 - self.gamma)
        if not self.decouple:
            step.update_grad = a * step.grad + (1 - a) * step.ascent_grad
            return
        step.grad.axpby_(1.0, -1.0, step.ascent_grad)  # the sharpness term g_s - g, in the memory of g_s
        step.require_finite(step.grad)
        step.update_grad = step.ascent_grad

    def updated(self, step: Step) -> None:
        if step.perturbed and self.decouple:
            a = self.gamma / (1 - self.gamma)
            for k, group in enumerate(step.groups):
                sign = -1.0 if group.get("maximize") else 1.0
                length = -sign * group["lr"] * a * step.clip_factor
                step.weights.group(k).axpby_(1.0, length, step.grad.group(k))
