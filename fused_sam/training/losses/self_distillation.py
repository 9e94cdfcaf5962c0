"""Self-distillation at w + e: the unperturbed outputs teach the perturbed weights.

    first pass:   L(w) = CE(z(w), y)
    second pass:  CE(z(w + e), y) + weight T^2 KL(softmax(z(w) / T) || softmax(z(w + e) / T))
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from fused_sam.engine.options import check_range
from fused_sam.sam import SAM
from fused_sam.training.per_pass import Criterion, Forward, PerPassLoss


class SelfDistillation(PerPassLoss):
    """SAM with self-distillation as a loss at w + e, after the idea of SADT (Fahim and Boutellier, arXiv 2211.00310).

    Use it with noisy labels or little data. The distillation term is that of Hinton et al., arXiv 1503.02531, with its
    factor T^2. What SADT's authors released is another recipe: ReleasedSADT.

        loss = losses.SelfDistillation(optimizer, weight=1.0, temperature=2.0)
        sam_step(model, loss, (inputs, targets), optimizer)

    Args:
        weight: 0 (SAM) or more, weight of the distillation term.
        temperature: T, above 0.
        dim: dimension of the outputs that counts classes, as for cross_entropy.
        optimizer, criterion, forward: as PerPassLoss.

    The term is a mean over all other dimensions. A copy of the outputs is kept from the first to the second pass.

    Raises:
        TypeError, ValueError: weight or temperature out of range; as PerPassLoss.
    """

    def __init__(
        self,
        optimizer: SAM,
        weight: float = 1.0,
        temperature: float = 1.0,
        *,
        criterion: Criterion | None = None,
        forward: Forward | None = None,
        dim: int = 1,
    ) -> None:
        self.weight = check_range("weight", weight, 0.0, float("inf"), open_high=True)
        self.temperature = check_range("temperature", temperature, 0.0, float("inf"), open_low=True, open_high=True)
        self.dim = dim
        super().__init__(optimizer, criterion, forward)

    def second(self, outputs: Tensor, targets: Tensor, earlier: Tensor | None) -> Tensor:
        assert earlier is not None
        t = self.temperature
        return self.criterion(outputs, targets) + self.weight * t**2 * divergence(earlier / t, outputs / t, self.dim)


def divergence(teacher: Tensor, student: Tensor, dim: int) -> Tensor:
    """Return the mean of KL(softmax(teacher) || softmax(student)) over all samples."""
    logs = log_softmax(student, dim), log_softmax(teacher, dim)
    return kl_div(*logs, reduction="none", log_target=True).sum(dim).mean()
