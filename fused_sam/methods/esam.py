"""ESAM: climb in a random part of the weights, and descend by the samples whose loss the climb raised most.

    mask ~ Bernoulli(beta);  e = (rho / beta) mask g / ||g||;  g_s = gradient at w + e of gamma B chosen samples
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fused_sam.backends.contract import MASK, Group
from fused_sam.backends.rng import stream_key, words
from fused_sam.engine.calls import Scan
from fused_sam.engine.options import check_range
from fused_sam.engine.plan import Plan
from fused_sam.sam import SAM


class ESAM(SAM):
    """Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
    arXiv 2110.03141: stochastic weight perturbation and sharpness-sensitive data selection.

    Args:
        beta: above 0, at most 1 (all): share of the weights that climb; 1 in the authors' program.
        gamma: above 0, at most 1 (all): share of the samples that the second gradient is of; about 0.5 in the paper, 1
            in the authors' program. Below 1, fused_sam.training.sam_step selects them, which knows each sample's loss
            and reads `selects`; step(closure) cannot and says so. By hand: fused_sam.training.select_sharp.
        mask: "elements": each weight by itself, drawn within the kernel and never stored, ||g|| over all. "tensors":
            whole tensors, as the authors' program has it, among those that had a gradient in the last step; the
            others' gradients are not computed (but in the first step), ||g|| is over those chosen. step(closure) sees
            to it; in a loop of one's own put the first pass within `with optimizer.ascent():`. Not for
            DistributedDataParallel, which waits for every gradient.
        Others: as SAM. Draws are a function of `seed` and their number, which a state_dict carries.

    Use it where SAM's second pass is too dear and each sample's loss is at hand. Published: 40% extra over the base
    optimizer to SAM's 100%, at SAM's accuracy.

    | per parameter, fp32 | bytes moved | launches | passes |
    |---|---|---|---|
    | elements | 44: P1 4, P2 16, P1 4, P3 20 | 4 | 1 + gamma; where gamma is below 1, 1/3 more for the losses |
    | tensors | 24 + 20 beta | 4 | as above; weights' gradients in the first: beta of them |

    Raises:
        TypeError, ValueError: beta, gamma or mask out of range, or mask="tensors" with a schedule that decides by the
            gradients; as SAM.
        RuntimeError: step(closure) with gamma below 1; a loss that does not use any of the tensors chosen.
    """

    _copied = (*SAM._copied, "beta", "gamma", "mask")
    _chosen: set[int] | None = None  # ids of the weights that climb in this step, if whole tensors are chosen

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        beta: float = 0.6,
        gamma: float = 0.6,
        mask: str = "elements",
        **options: Any,
    ) -> None:
        self.beta = check_range("beta", beta, 0, 1, open_low=True)
        self.gamma = check_range("gamma", gamma, 0, 1, open_low=True)
        if mask not in ("elements", "tensors"):
            raise ValueError(f'mask must be "elements" or "tensors", not {mask!r}')
        schedule = options.get("schedule")
        if mask == "tensors" and getattr(schedule, "needs_gradients", False):
            raise ValueError(
                f'mask="tensors" leaves gradients out before {type(schedule).__name__} decides: use mask="elements"'
            )
        self.mask = mask
        super().__init__(params, base_optimizer, rho, adaptive, **options)

    @property
    def selects(self) -> float | None:
        """The share of samples that the second gradient is to be of; None for all."""
        return self.gamma if self.gamma < 1 else None

    def _own_defaults(self) -> dict[str, Any]:
        # "idle": places in the group of the weights that had no gradient in the last step; None before one.
        own = {"draws": 0} if self.mask == "elements" else {"choices": 0, "idle": None}
        return {**super()._own_defaults(), **own}

    def _groups(self) -> list[Group]:
        if self.mask == "elements":
            return [g._replace(share=self.beta) for g in super()._groups()]
        return [g._replace(rho=g.rho / self.beta) for g in super()._groups()]

    def _whole_step(self, closure: Any) -> Any:
        if closure is not None and self.gamma < 1:
            raise RuntimeError(
                f"step(closure) cannot select samples (gamma is {self.gamma:g}): a closure gives their mean alone; "
                "use fused_sam.training.sam_step with a loss for each sample, or gamma=1"
            )
        return super()._whole_step(closure)

    # ---- whole tensors --------------------------------------------------------------------------------------

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """Around the first forward and backward: with mask="tensors", gradients of the weights chosen alone are
        computed.

        Chooses anew unless that was done in this step. Does nothing with mask="elements", where the step does not
        perturb, and in the first step, which tells which weights the loss uses.
        """
        known = all(group.get("idle") is not None for group in self.param_groups)
        chosen = self._choose() if known else None
        off = [] if chosen is None else [p for p in self._parameters() if p.requires_grad and id(p) not in chosen]
        for p in off:
            p.requires_grad_(False)
        try:
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

    def _first_pass(self) -> AbstractContextManager[None]:
        return self.ascent()

    def _choose(self) -> set[int] | None:
        """ids of the weights that climb: each with probability beta, at least one; None for all."""
        if self.mask == "elements" or not self.perturbs:
            return None
        if self._chosen is None:
            climbing = [
                p
                for group, climbs in zip(self.param_groups, self._takes_part(), strict=True)
                for i, p in enumerate(group["params"])
                if climbs and p.requires_grad and p.numel()
                and (p.grad is not None if group["idle"] is None else i not in group["idle"])
            ]
            key = stream_key(self._precision.seed, self.param_groups[0]["choices"], 0, MASK)
            drawn = dict(zip(map(id, climbing), words(key, torch.zeros(len(climbing))).tolist(), strict=True))
            least = min(drawn.values(), default=0)
            self._chosen = {k for k, word in drawn.items() if word < self.beta * 2**32 or word == least}
        return self._chosen

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """As SAM's; with mask="tensors", gradients of weights that are not chosen are dropped."""
        chosen = None if self._perturbed is not None else self._choose()
        if chosen is not None:
            for group, climbs in zip(self.param_groups, self._takes_part(), strict=True):
                for p in group["params"]:
                    if climbs and id(p) not in chosen:
                        p.grad = None
        super().first_step(zero_grad)

    def _updated(self, plan: Plan, scan: Scan, groups: list[Group]) -> None:
        if self.mask == "tensors":
            without = {id(p) for p, g in zip(plan.owners, scan.gradients, strict=True) if g is None}
            for group in self.param_groups:
                group["choices"] += self._chosen is not None
                group["idle"] = tuple(i for i, p in enumerate(group["params"]) if id(p) in without)
        self._chosen = None

    def restore(self) -> None:
        """As SAM's; the next step chooses anew, the same weights."""
        self._chosen = None
        super().restore()

    def _forget(self) -> None:
        super()._forget()
        self._chosen = None
