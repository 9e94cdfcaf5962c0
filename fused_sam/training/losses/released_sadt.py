"""SADT as its authors released it: two updates per batch, the second one with the sum of two gradients.

    g = grad CE(z(w), y);                          w' = BASE(w, g)
    h = grad KL(softmax(z(w)) || softmax(z(w' + e)));   w'' = BASE(w', g + h)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam.engine.options import overrides
from fused_sam.engine.sharding import local
from fused_sam.methods import MicrobatchSAM
from fused_sam.sam import SAM
from fused_sam.training.batch_norm import frozen_batch_norm
from fused_sam.training.batches import split
from fused_sam.training.per_pass import Criterion, Forward, PerPassLoss
from fused_sam.training.rng import ReplayedRNG
from fused_sam.training.scale import set_ascent_grad_scale
from fused_sam.training.step import Evaluator, StepResult

from .self_distillation import divergence


class ReleasedSADT:
    """Fahim and Boutellier, "SADT", NeurIPS 2022 workshop, arXiv 2211.00310, as the program released with it trains.

    It is no loss at w + e, but a step of its own: an ordinary update with the cross-entropy's gradient g; then a
    perturbation along g, where the loss is the divergence from the outputs before both, without a temperature and
    without a weight; then a second update with the sum of both gradients. SelfDistillation is the recipe as a loss of
    SAM. Published: better accuracy and faster convergence than SAM and self-distillation, on small images.

        optimizer = SAM(model.parameters(), torch.optim.Adam, rho=..., lr=1e-3)
        ReleasedSADT(optimizer).step(model, (inputs, targets))

    Args:
        optimizer: e is its perturbation. The program's is 1e-3 g, not normalised, or Gaussian noise.
        criterion, forward: as PerPassLoss.
        dim: dimension of the outputs that counts classes.

    A schedule counts batches, and in a step that it leaves out only the first update is made. A learning-rate scheduler
    is the loop's, once per batch.

    Raises:
        TypeError: as PerPassLoss; MicrobatchSAM.
        ValueError: a method that takes or changes the first gradients (GSAM, LookSAM, WSAM, FriendlySAM, GCSAM) or
            selects samples (ESAM with gamma below 1).
    """

    def __init__(
        self, optimizer: SAM, criterion: Criterion | None = None, forward: Forward | None = None, dim: int = 1
    ) -> None:
        self._loss = _Divergence(optimizer, criterion, forward)
        self._loss.dim = dim
        self._optimizer = optimizer
        self._check()

    def step(
        self,
        model: nn.Module,
        batch: Any,
        *,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        microbatches: int | Iterable[Any] = 1,
        freeze_batch_norm: bool = True,
        replay_rng: bool = True,
    ) -> StepResult:
        """Clear the gradients and make both updates from a batch (inputs, targets); arguments are as sam_step()'s.

        Returns:
            The cross-entropy at w, the divergence at w' + e, and True if the last update was skipped. An exception
            leaves the weights and the state as the last update left them.
        """
        optimizer, loss = self._optimizer, self._loss
        self._check()
        optimizer.refuse_perturbed("ReleasedSADT.step() was called")
        parts = split(batch, microbatches)
        evaluator = Evaluator(model, loss, scaler, autocast, per_sample=False)
        optimizer.zero_grad()
        set_ascent_grad_scale(optimizer, scaler)
        rng: AbstractContextManager[Any] = ReplayedRNG.of(model) if replay_rng else nullcontext()
        divergence_at_e = None
        try:
            value, _ = evaluator.backward(parts)
            perturbs = optimizer.needs_second_pass
            if scaler is not None:
                scaler.unscale_(optimizer)  # e and the sum need g without the scale, which update() may change
            self._update(scaler)
            if perturbs:
                counts = self._counts()
                loss.continue_step()
                optimizer.stepper.decision = True
                optimizer.first_step(grad_scale=None if scaler is None else 1.0)
                if scaler is not None:
                    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                    scale = scaler.scale(torch.ones((), device=optimizer.stepper.device()))
                    torch._foreach_mul_([local(p.grad) for p in params], scale)
                with frozen_batch_norm(model) if freeze_batch_norm else nullcontext(), rng:
                    divergence_at_e, _ = evaluator.backward(parts)
                self._update(scaler)
                self._restore(counts)  # a schedule counts batches
        except BaseException:
            optimizer.restore()
            raise
        return StepResult(value, divergence_at_e, optimizer.skipped)

    def _update(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()

    def _counts(self) -> list[dict[str, Any]]:
        """Return the schedule's counters in each group."""
        schedule = self._optimizer.schedule
        names = () if schedule is None else tuple(schedule.group_state())
        return [{name: group[name] for name in names} for group in self._optimizer.param_groups]

    def _restore(self, counts: list[dict[str, Any]]) -> None:
        for group, values in zip(self._optimizer.param_groups, counts, strict=True):
            group.update(values)

    def _check(self) -> None:
        optimizer = self._optimizer
        name = type(optimizer).__name__
        if isinstance(optimizer, MicrobatchSAM):
            raise TypeError("ReleasedSADT makes two updates of its own per batch: use SAM, and step(microbatches=...)")
        if optimizer.keeps_ascent_grad or overrides(type(optimizer), "ascent"):
            raise ValueError(
                f"{name} takes or changes the first gradients, which ReleasedSADT adds to the second ones: use SAM"
            )
        self._loss.check()


class _Divergence(PerPassLoss):
    """The criterion in the first pass, and the divergence from its outputs in the second one."""

    dim: int = 1

    def continue_step(self) -> None:
        """Keep the first pass's outputs over the update between the passes."""
        self._step = self.optimizer.stepper.steps_ended

    def second(self, outputs: Tensor, targets: Tensor, earlier: Tensor | None) -> Tensor:
        assert earlier is not None
        return divergence(earlier, outputs, self.dim)
