"""RandomSAM: the perturbation is drawn at random; one pass per step.

    e = rho n / ||n||,  n standard normal;  w = BASE(w, grad L(w + e))
"""

from __future__ import annotations

from fused_sam.engine.noise import AlongNoise
from fused_sam.engine.stepper import Stepper
from fused_sam.step import Step

from .displaced import DisplacedSAM


class RandomSAM(DisplacedSAM):
    """A random perturbation of SAM's length: the baseline that shows what SAM's direction is worth.

    "RandSAM" in the program of Vani et al., "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM
    Dynamics", ICML 2024, arXiv 2406.06700, where it takes two passes. Use it to compare SAM with, or for a smoothed
    loss at the price of one pass.

    Options: SAM's, with any base optimizer but those that have train() and eval(). n is drawn for all trainable weights
    of perturbed groups. It is a function of `seed` and the number of the step, the same on every backend and on every
    process, also of sharded weights. A schedule decides after a step whether the next gradient is taken from displaced
    weights; it cannot be one that reads gradients.

    Used as MomentumSAM is: backward(), step(), eval() before evaluating and saving, train() afterwards and after
    loading.

    Raises:
        ValueError: a schedule that reads gradients, decay_in_ascent; as SAM.
        TypeError: a base optimizer with train() or eval(); as SAM.
        RuntimeError: first_step(), second_step(), or step() with clean weights after the first step.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | every step | 44: check 4, update 20 with the undo, norm of n 4, perturb 16; drawing n | 4, and 29 per tensor | 1 |

    n is drawn by torch's elementwise operations, about 29 per tensor, and takes longer than the rest. A captured CUDA
    graph repeats its n. Memory on top of SAM's: 4 bytes for n while it is used.
    """

    GROUP_STATE = {"noise_step": 0}
    displaced_by = "at random"

    def make_displacement(self, stepper: Stepper) -> AlongNoise:
        return AlongNoise(stepper, lambda: int(self.param_groups[0]["noise_step"]))

    def updated(self, step: Step) -> None:
        for group in step.groups:
            group["noise_step"] += 1
        super().updated(step)
