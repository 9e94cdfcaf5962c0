"""ESAM: perturb a random part of the weights, and update by the samples whose loss the perturbation raised most.

    mask ~ Bernoulli(beta);  e = (rho / beta) mask g / ||g||;  g_s = gradient at w + e of gamma B chosen samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import MASK
from fused_sam.backends.rng import random_words, stream_key
from fused_sam.engine.user_warnings import warn_of_missing_selection
from fused_sam.sam import SAM
from fused_sam.step import Number, Step, option


class ESAM(SAM):
    """Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022.

    arXiv 2110.03141: stochastic weight perturbation and sharpness-sensitive data selection. Use it if SAM's second pass
    is too expensive and each sample's loss is at hand. Published: 40% extra over the base optimizer to SAM's 100%, at
    SAM's accuracy.

    Args:
        beta: above 0, at most 1 (all): share of the weights that are perturbed.
        gamma: above 0, at most 1 (all): share of the samples that the second gradient is of. Below 1,
            fused_sam.training.sam_step selects them, because it has each sample's loss, and reads `selected_fraction`;
            step(closure) cannot and raises an error. By hand: fused_sam.training.select_sharp.
        mask: "elements": each weight by itself, drawn within the kernel and never stored; ||g|| is over all. "tensors":
            whole tensors, as in the authors' program, among those that had a gradient in the last step. Gradients of
            tensors that are not drawn are not computed (except in the first step), and ||g|| is over those drawn.
            step(closure) does that. In a hand-written loop put the first pass within
            `with optimizer.first_pass():`. Not for DistributedDataParallel, which waits for every gradient.
        Others: as SAM. The defaults of beta, gamma and rho are the authors' run of ResNet-18; their class has 1 and 1,
            which is SAM. Their WRN and PyramidNet have beta 0.5, and rho 0.1 and 0.2 (docs/recipes.md). Draws are a
            function of `seed` and their number, which a state_dict carries.

    Raises:
        TypeError, ValueError: beta, gamma or mask out of range, mask="tensors" with a schedule that decides by the
            gradients, or a norm that is not "global": the masks are made for that one; as SAM.
        RuntimeError: step(closure) with gamma below 1; a loss that does not use any of the tensors chosen.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | elements | 44: norm 4, perturb 16, check 4, update 20 | 4 | 1 + gamma; 1/3 more for losses if gamma is below 1 |
    | tensors | 24 + 20 beta | 4 | as above; weights' gradients in the first: beta of them |
    """

    OPTIONS = {
        "beta": option(0.6, low=0, high=1, open_low=True, help="share of the weights that are perturbed"),
        "gamma": option(0.5, low=0, high=1, open_low=True, help="share of the samples of the second gradient"),
        "mask": option("elements", choices=("elements", "tensors"), fixed=True, help="what is drawn"),
    }
    beta: float
    gamma: float
    selections = 0
    """How often select_sharp() has selected samples, for any optimizer."""
    selections_before: int | None = None
    """`selections` at first_step(), to find a step by hand in which nothing was selected."""
    warned: bool = False
    """True after the warning of such a step, which comes once."""
    mask: str
    needs_grad_scale = False

    def __init__(
        self, params: ParamsT, base_optimizer: Callable[..., Optimizer] = torch.optim.SGD, *args: Any, **options: Any
    ) -> None:
        schedule = options.get("schedule")
        if options.get("mask") == "tensors" and getattr(schedule, "needs_gradients", False):
            raise ValueError(
                f'mask="tensors" leaves gradients out before {type(schedule).__name__} decides: use mask="elements"'
            )
        if options.get("norm", "global") != "global":
            raise ValueError(
                f"norm={options['norm']!r} cannot be combined with ESAM's masks, whose length rho / beta is of the "
                'global norm: leave norm="global", or use SAM or LayerSAM'
            )
        super().__init__(params, base_optimizer, *args, **options)

    @property
    def selected_fraction(self) -> float | None:
        """The share of samples that the second gradient is to be of; None for all."""
        return self.gamma if self.gamma < 1 else None

    @property
    def mask_prob(self) -> float:  # type: ignore[override]
        """The share of the elements that a perturbation moves."""
        return self.beta if self.mask == "elements" else 1.0

    def group_state(self) -> dict[str, Any]:
        # "idle_params": places in the group of the weights that had no gradient in the last step; None before one.
        own = {"rng_offset": 0} if self.mask == "elements" else {"mask_offset": 0, "idle_params": None}
        return {**super().group_state(), **own}

    def radius(self, step: Step) -> Any:
        return None if self.mask == "elements" else step.rho / self.beta

    def run_step(self, closure: Callable[..., Any] | None) -> Any:
        if closure is not None and self.gamma < 1:
            raise RuntimeError(
                f"step(closure) cannot select samples (gamma is {self.gamma:g}): a closure gives their mean alone; "
                "use fused_sam.training.sam_step with a loss for each sample, or gamma=1"
            )
        if closure is None and self.gamma < 1 and self.perturbed and self.selections_before == ESAM.selections:
            self.warned = True
            warn_of_missing_selection(self.gamma)
        return super().run_step(closure)

    # ---- whole tensors --------------------------------------------------------------------------------------

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Compute, within `with`, the gradients of the weights chosen only; put the first forward and backward there.

        Does nothing with mask="elements", in a step that does not perturb, and in the first step, which shows which
        weights the loss uses.
        """
        known = all(group.get("idle_params") is not None for group in self.param_groups)
        chosen = self.choose() if known else None
        params = [p for group in self.param_groups for p in group["params"]]
        off = [] if chosen is None else [p for p in params if p.requires_grad and id(p) not in chosen]
        try:
            for p in off:
                p.requires_grad_(False)
            yield
        except RuntimeError as error:
            if off and "does not require grad" in str(error):
                raise RuntimeError(
                    'the loss uses none of the weights that mask="tensors" has chosen for this step: leave weights '
                    'that it does not use out of the optimizer, or use mask="elements"'
                ) from error
            raise
        finally:
            for p in off:
                p.requires_grad_(True)

    def choose(self) -> set[int] | None:
        """Return the ids of the weights that are perturbed, each with probability beta, at least one; None for all.

        A function of the seed and of the number of the step: it may be asked more than once.
        """
        if self.mask == "elements" or not self.needs_second_pass:
            return None
        candidates = [
            p
            for group in self.param_groups
            if group["perturb"]
            for i, p in enumerate(group["params"])
            if p.requires_grad and p.numel()
            and (p.grad is not None if group["idle_params"] is None else i not in group["idle_params"])
        ]  # fmt: skip
        key = stream_key(self.stepper.settings.precision.seed, self.param_groups[0]["mask_offset"], 0, MASK)
        words = random_words(key, torch.zeros(len(candidates))).tolist()
        drawn = dict(zip(map(id, candidates), words, strict=True))
        least = min(drawn.values(), default=0)
        return {k for k, word in drawn.items() if word < self.beta * 2**32 or word == least}

    def first_step(self, zero_grad: bool = False, *, grad_scale: Number | None = None) -> None:
        """Perturb as SAM does; with mask="tensors", gradients of weights that are not chosen are dropped."""
        self.finish_abandoned_step()
        chosen = self.choose()
        if chosen is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if group["perturb"] and id(p) not in chosen:
                        p.grad = None
        super().first_step(zero_grad, grad_scale=grad_scale)
        self.selections_before = None if self.warned else ESAM.selections

    def updated(self, step: Step) -> None:
        if self.mask == "tensors":
            used = {id(p) for p, _ in step.grad.items()}
            for group in self.param_groups:
                group["mask_offset"] += step.perturbed
                group["idle_params"] = tuple(i for i, p in enumerate(group["params"]) if id(p) not in used)
