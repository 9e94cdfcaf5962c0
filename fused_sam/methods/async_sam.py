"""AsyncSAM: the ascent follows the gradient of the last step; one pass per step.

    stored: w~ = w + rho g' / ||g'||,  g' the gradient of the last update
    g = grad L(w~);  w = w~ - rho g' / ||g'||;  w = BASE(w, g);  g' = g
"""

from __future__ import annotations

from fused_sam.engine.displacement import AlongLastGradient
from fused_sam.engine.stepper import Stepper
from fused_sam.step import Step

from .displaced import DisplacedSAM


class AsyncSAM(DisplacedSAM):
    """Jo, Lim and Lee, "Asynchronous Sharpness-Aware Minimization for Fast and Accurate Deep Learning".

    arXiv 2503.11147, with a staleness of one step, on one device. Use it if a second pass cannot be paid and the base
    optimizer has no momentum, or if SAM's rho is to be kept. Published: SAM's accuracy in about SGD's time.

    Options: SAM's, with any base optimizer but those that have train() and eval(). A schedule decides after a step
    whether the next gradient is taken from displaced weights; it cannot be one that reads gradients.

    Used as MomentumSAM is: backward(), step(), eval() before evaluating and saving, train() afterwards and after
    loading. g' is "last_gradient" in the state. A skipped step leaves it as it is.

    Differs from the authors' program: there another device computes g' meanwhile, at the clean weights of the last step
    and from a batch of a size that this device has time for. Here g' costs no pass: it is the gradient of the last
    update, which was taken at displaced weights.

    Raises:
        ValueError: a schedule that reads gradients, decay_in_ascent; as SAM.
        TypeError: a base optimizer with train() or eval(); as SAM.
        RuntimeError: first_step(), second_step(), or step() with clean weights after the first step.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 52: check 4, update 20 with the undo, copy of g 8, norm 4, perturb 16 | 5 | 1 |

    Memory on top of SAM's: 4 bytes for g'.
    """

    displaced_by = "along the last gradient"

    def make_displacement(self, stepper: Stepper) -> AlongLastGradient:
        return AlongLastGradient(stepper)

    def updated(self, step: Step) -> None:
        step.state(AlongLastGradient.NAME).copy_(step.grad)
        super().updated(step)
