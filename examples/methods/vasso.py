"""VaSSO-like SAM (Li and Giannakis, arXiv 2308.11214): the perturbation follows a running average of gradients.

    d = (1 - theta) d + theta g;  e = rho d / ||d||;  w = BASE(w, grad L(w + e))
"""

from fused_sam import SAM, Step, option


class VaSSO(SAM):
    """SAM along the average d, which is "direction" in the state. Options: theta, and SAM's."""

    OPTIONS = {"theta": option(0.4, low=0, high=1, open_low=True)}
    keeps_ascent_grad = True
    theta: float

    def ascent(self, step: Step) -> None:
        step.grad.axpby_(self.theta, 1 - self.theta, step.state("direction"))

    def updated(self, step: Step) -> None:
        if step.perturbed:
            step.state("direction").copy_(step.ascent_grad)
