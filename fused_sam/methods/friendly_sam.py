"""F-SAM, "Friendly": the perturbation follows what is this batch's own in its gradient, without the average of batches.

    first step: d = g, m = g;  after: d = g - sigma m, m = lmbda m + (1 - lmbda) g
    e = rho d / ||d||;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from fused_sam.sam import SAM
from fused_sam.step import Step, option


class FriendlySAM(SAM):
    """Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350.

    Use it if batches are small or differ much. Published: above SAM on CIFAR and ImageNet with several networks, and
    more robust to label noise.

    The average m is subtracted before this batch enters it, as in the authors' program. The paper's text enters it
    first, which for sigma = 1 is the same direction.

    Args:
        sigma: 0 to 100, how much of the average is subtracted; 1 in the paper.
        lmbda: 0 to 1, the average's memory; 0.9 in the authors' class. The paper has 0.6 to 0.95; their run script on
            CIFAR-100 has 0.95, with rho 0.2.
        Others: as SAM.

    m is "gradient_average" in the state, of gradients without a loss scale. A skipped step does not enter it, and a
    weight's begins with its first update. With a schedule it averages over the steps that perturb. Under a GradScaler
    pass the scale with every step: first_step(grad_scale=scaler.get_scale()). first_step() takes the gradients from the
    parameters.

    Raises:
        TypeError, ValueError: sigma or lmbda out of range; as SAM.
        RuntimeError: an update under a GradScaler whose scale was not told; nothing is changed.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 68: axpby 12, norm 4, perturb 16, check 4, update 20, axpby 12 | 6 | 2 |

    Memory on top of SAM's: 4 bytes for m; 4 more for d during the second pass.
    """

    OPTIONS = {
        "sigma": option(1.0, low=0, high=100, help="how much of the average gradient is subtracted"),
        "lmbda": option(0.9, low=0, high=1, help="memory of the average gradient"),
    }
    sigma: float
    lmbda: float
    keeps_ascent_grad = True
    needs_grad_scale = True

    def ascent(self, step: Step) -> None:
        step.grad.axpby_(1.0, -self.sigma, step.state("gradient_average"))

    def updated(self, step: Step) -> None:
        if step.perturbed:
            # The kept gradient is d, and g = d + sigma m: m needs no copy of g. A new m is g, which is d then.
            memory, d = self.lmbda + (1 - self.lmbda) * self.sigma, step.ascent_grad
            step.state("gradient_average").axpby_(memory, 1 - self.lmbda, d, first=1.0)
