"""OBF, output-bias forgetting: the perturbation forgets what the outputs are biased to, and not what the batch shows.

    first pass:   the gradient of the mean of (1/K - a p - (1 - a) y) . z over samples, with p, a constant
                  a = gamma max(0, (1 - lambda / p_y) / (1 - lambda)),  lambda = 1 / C
    second pass:  the ordinary loss at w + e

K classes, outputs z, one-hot targets y, p = sigmoid(z) or softmax(z).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from fused_sam.engine.options import check_range
from fused_sam.methods import GSAM
from fused_sam.sam import SAM
from fused_sam.training.per_pass import Criterion, Forward, PerPassLoss, with_value

ACTIVATIONS = {"sigmoid": torch.sigmoid, "softmax": lambda z: torch.softmax(z, -1)}


class OutputBiasForgetting(PerPassLoss):
    """Vani et al., "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM Dynamics", ICML 2024.

    arXiv 2406.06700. Use it for image classifiers. Published: above SAM, GSAM and ASAM on ImageNet and after transfer
    to CIFAR, with ViT-S and ResNets.

        loss = losses.OutputBiasForgetting(optimizer)
        sam_step(model, loss, (inputs, targets), optimizer)

    The first pass ascends (1 - a) CE(z, y) - CE(z, uniform), by its gradient as in the authors' program. The second
    pass is the ordinary loss.

    Args:
        C: above 1, 1 / lambda; 1000 in the authors' program. inf: lambda is 0, and a is gamma.
        gamma: 0 to 1, scales a. The authors' runs have 1 for ViTs, and 1e-12 for ResNets, for ViTs with ASAM, and for
            fine-tuning.
        activation: "sigmoid" or "softmax", which makes p of the outputs. The authors' program has the sigmoid.
        criterion: the ordinary loss. None: with "sigmoid" binary cross-entropy, summed over classes and averaged over
            samples, as in the authors' ViT runs; with "softmax" cross-entropy.
        optimizer, forward: as PerPassLoss. Outputs are [B, K], targets [B] numbers of classes.

    Both passes have the value of the ordinary loss, at w and at w + e. A step that does not perturb (rho 0, a schedule)
    has the ordinary loss in its one pass. step() after the first pass of a step that should perturb raises an error,
    because it would update with the gradient of the perturbation. Methods that take part of the update from the first
    gradient are refused, except for GSAM, which the authors use.

    Raises:
        TypeError, ValueError: C, gamma or activation out of range; outputs or targets of another shape; as PerPassLoss.
        ValueError: a schedule that decides by the first gradient (AdaptiveSchedule); WSAM, LookSAM.
        RuntimeError: step() without first_step().
    """

    keeps_outputs: ClassVar[bool] = False

    def __init__(
        self,
        optimizer: SAM,
        C: float = 1000.0,
        gamma: float = 1.0,
        activation: str = "sigmoid",
        *,
        criterion: Criterion | None = None,
        forward: Forward | None = None,
    ) -> None:
        check_range("C", C, 1.0, float("inf"), open_low=True)
        self.C, self.gamma = float(C), check_range("gamma", gamma, 0.0, 1.0)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be 'sigmoid' or 'softmax', not {activation!r}")
        self.activation = activation
        if criterion is None and activation == "sigmoid":
            criterion = summed_binary_cross_entropy
        super().__init__(optimizer, criterion, forward)
        hook = optimizer.register_step_pre_hook(partial(_refuse_plain_step, weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def first(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
            raise ValueError(
                "OutputBiasForgetting needs outputs [B, K] and targets [B] that are numbers of classes, not outputs "
                f"{list(outputs.shape)} and targets {list(targets.shape)} in {targets.dtype}"
            )
        ordinary = self.criterion(outputs, targets)
        if not self.optimizer.stepper.decide():
            return ordinary
        z = outputs.detach()
        p, y = ACTIVATIONS[self.activation](z), one_hot(targets, z.shape[1]).to(z)
        floor = 1 / self.C
        a = 1 - floor / p.gather(1, targets[:, None]).clamp(min=floor) if floor else torch.ones_like(p[:, :1])
        a = a * (self.gamma / (1 - floor))
        return with_value(((1 / z.shape[1] - a * p - (1 - a) * y) * outputs).sum(1).mean(), ordinary)

    def check(self, ascent_fraction: float = 1.0) -> None:
        super().check(ascent_fraction)
        optimizer = self.optimizer
        if optimizer.schedule is not None and optimizer.schedule.needs_gradients:
            raise ValueError(
                f"{type(optimizer.schedule).__name__} decides by the first gradient whether a step perturbs, but "
                "OutputBiasForgetting must know that before: use a schedule that counts steps"
            )
        if optimizer.keeps_ascent_grad and optimizer.combines_grads and not isinstance(optimizer, GSAM):
            raise ValueError(
                f"{type(optimizer).__name__} updates the weights with the first gradient too, which "
                "OutputBiasForgetting makes for the perturbation alone: use SAM, ASAM or GSAM"
            )


def summed_binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return binary cross-entropy with one-hot targets, summed over classes and averaged over samples."""
    losses = binary_cross_entropy_with_logits(outputs, one_hot(targets, outputs.shape[1]).to(outputs), reduction="none")
    return losses.sum(1).mean()


def _refuse_plain_step(
    loss: Callable[[], OutputBiasForgetting | None], optimizer: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    found = loss()
    closures = [each for each in (*arguments, *options.values()) if each is not None and each is not optimizer]
    if found is not None and not closures and found.first_pass_waits() and optimizer.stepper.decide():
        raise RuntimeError(
            "step() would update the weights with the gradient that OutputBiasForgetting makes for the perturbation: "
            "call first_step() before the second pass, or use step(closure) or sam_step()"
        )
