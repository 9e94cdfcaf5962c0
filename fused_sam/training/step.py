"""sam_step() makes a whole SAM training step, with mixed precision, accumulation, batch norm, dropout and skipping.

    result = sam_step(model, loss_fn, batch, optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fused_sam.methods import MicrobatchSAM
from fused_sam.sam import SAM

from .batch_norm import frozen_batch_norm
from .batches import MicroBatch, checked_size, leading_samples, selected_samples, split
from .local import local_perturbation
from .per_pass import PerPassLoss
from .rng import ReplayedRNG
from .scale import set_ascent_grad_scale
from .selection import select_sharp

LossFn = Callable[[nn.Module, Any], Tensor]
MakeContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class StepResult:
    """Holds what sam_step() returns: 0-dim tensors on the model's device. Reading their values waits for it."""

    loss: Tensor  # mean of the first pass, at the weights, detached
    perturbed_loss: Tensor | None  # mean of the second pass, detached; None after a step of one pass
    skipped: Tensor  # True if a gradient was not finite, so that the update changed nothing


def sam_step(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: SAM,
    *,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    microbatches: int | Iterable[Any] = 1,
    ascent_fraction: float = 1.0,
    local: bool = False,
    freeze_batch_norm: bool = True,
    replay_rng: bool = True,
    scheduler: Any = None,
) -> StepResult:
    """Clear the gradients and make one update from a batch, in one pass if the optimizer does not perturb.

    Use it as the body of a training loop in plain torch: it replaces both passes and the optimizer's steps.

    Args:
        model: the model as training calls it. DistributedDataParallel averages once per pass.
        loss_fn: loss_fn(model, batch) returns the batch's mean loss, or its samples' losses, which are then averaged.
            It runs once per micro-batch and pass. Examples:
            `lambda model, batch: cross_entropy(model(batch[0]), batch[1])`, `lambda model, batch: model(**batch).loss`.
            fused_sam.training.losses has losses that differ between the passes.
        batch: anything that loss_fn takes. To be cut (microbatches, ascent_fraction, selection), it must be a nest of
            tuples, lists and mappings. The first dimension of its tensors then counts samples.
        optimizer: a fused_sam optimizer without a wrapper. MicrobatchSAM makes both passes for one micro-batch after
            the other; it needs num_microbatches of them, and each weighs as its samples. ESAM with gamma below 1 has
            its samples selected here (arXiv 2110.03141). A forward pass without graph gives the losses at the perturbed
            weights, then only the selected samples go forward and backward. That costs about 1/3 + gamma passes
            instead of 1.
        scaler: scales the losses, steps, and is updated. None: no scaling.
        autocast: dtype of torch.autocast around loss_fn, on the device of the model's first parameter.
        microbatches: a number cuts the batch into that many, and their gradients are accumulated. An iterable of
            batches replaces `batch`, which must be None. Each weighs as its samples. The step is that of the whole
            batch if the loss is a mean over samples and no layer mixes samples. A batch with fewer samples, such as the
            last one of an epoch, is cut into fewer.
        ascent_fraction: the perturbation follows the gradient of the first max(1, round(fraction * B)) samples (partial
            batch ascent, Bahri et al., arXiv 2110.08529: 1/4). Dropout masks then differ between the passes. A step
            that does not perturb uses the whole batch. Not for GSAM, WSAM, LookSAM and AdaptiveSchedule.
        local: under DistributedDataParallel, perturb by the process's own gradient (see local_perturbation).
        freeze_batch_norm: batch-norm statistics are those of the first pass alone.
        replay_rng: the second pass draws the first pass's random numbers, from the CPU's generator and those of the
            model's devices.
        scheduler: is stepped after an update that was not skipped. That check waits for the device.

    An exception leaves the weights and the optimizer's state as they were. It does not undo what the first pass changed
    elsewhere (batch-norm statistics, random generators).

    Raises:
        TypeError: the optimizer is not SAM, or is wrapped; loss_fn returns no tensor; the scheduler needs a metric.
        RuntimeError: the weights are perturbed already.
        ValueError: an option is out of range, a batch cannot be cut, or a loss has another shape than [] or [B].
    """
    _check_options(optimizer, ascent_fraction, scheduler)
    if isinstance(loss_fn, PerPassLoss):
        _check_loss(loss_fn, optimizer, ascent_fraction)
    if isinstance(microbatches, Integral):  # NumPy's integers too
        microbatches = int(microbatches)
    gamma: float | None = getattr(optimizer, "selected_fraction", None)
    if isinstance(optimizer, MicrobatchSAM):
        microbatches = _microbatches_of(optimizer, microbatches, ascent_fraction)
    if gamma is not None and ascent_fraction < 1:
        raise ValueError("data selection compares the loss of every sample: ascent_fraction must be 1, or gamma 1")
    parts = split(batch, microbatches)
    if gamma is not None:
        for part in parts:
            checked_size(part.batch, "data selection")
    partial_ascent = ascent_fraction < 1 and optimizer.needs_second_pass
    ascent_parts = leading_samples(parts, ascent_fraction) if partial_ascent else parts
    evaluator = Evaluator(model, loss_fn, scaler, autocast, per_sample=gamma is not None)

    optimizer.zero_grad()
    set_ascent_grad_scale(optimizer, scaler)
    contexts = _Contexts(
        first=partial(local_perturbation, model, optimizer) if local else nullcontext,
        second=partial(frozen_batch_norm, model) if freeze_batch_norm else nullcontext,
        rng=partial(ReplayedRNG.of, model) if replay_rng and not partial_ascent else nullcontext,
    )
    fewer: AbstractContextManager[None] = nullcontext()
    if isinstance(optimizer, MicrobatchSAM) and len(parts) < optimizer.num_microbatches:
        fewer = optimizer.fewer_microbatches(len(parts))
    try:
        with fewer:
            if isinstance(optimizer, MicrobatchSAM):
                loss, perturbed_loss = _msam_passes(optimizer, evaluator, parts, contexts)
            else:
                rng = contexts.rng()
                with optimizer.first_pass(), contexts.first():
                    loss, before = evaluator.backward(ascent_parts)
                perturbed_loss = None
                if optimizer.needs_second_pass:
                    optimizer.first_step(zero_grad=True)
                    with contexts.second():
                        if gamma is not None:
                            with rng:
                                after = evaluator.losses(parts)
                            parts = selected_samples(parts, select_sharp(torch.cat(before), after, gamma))
                            rng = nullcontext()  # the first pass's masks are for other samples
                        with rng:
                            perturbed_loss, _ = evaluator.backward(parts)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    except BaseException:
        optimizer.restore()
        raise
    if perturbed_loss is not None and optimizer.stepper.loss_check is not None:
        optimizer.note_losses(loss, perturbed_loss)
    if scheduler is not None and not optimizer.step_was_skipped:
        scheduler.step()
    return StepResult(loss, perturbed_loss, optimizer.skipped)


@dataclass(frozen=True)
class _Contexts:
    """Makes the context managers that the passes run in."""

    first: MakeContext  # around the first pass
    second: MakeContext  # around the second pass
    rng: MakeContext  # made before the first pass, entered around the second


def _microbatches_of(
    optimizer: MicrobatchSAM, microbatches: int | Iterable[Any], ascent_fraction: float
) -> int | list[Any]:
    """Return the micro-batches of a step of mSAM: as many as the optimizer has."""
    if ascent_fraction < 1:
        raise ValueError("MicrobatchSAM perturbs by the gradient of every micro-batch: ascent_fraction must be 1")
    k = optimizer.num_microbatches
    if isinstance(microbatches, int):
        if microbatches not in (1, k):
            raise ValueError(f"MicrobatchSAM has num_microbatches={k}, but microbatches={microbatches}: leave it out")
        return k
    batches = list(microbatches)
    if len(batches) != k:
        raise ValueError(f"MicrobatchSAM has num_microbatches={k}, but got {len(batches)} micro-batches")
    return batches


def _msam_passes(
    optimizer: MicrobatchSAM, evaluator: Evaluator, parts: list[MicroBatch], contexts: _Contexts
) -> tuple[Tensor, Tensor | None]:
    """Make both passes for one micro-batch after the other; return the means of both losses."""
    losses, perturbed_losses = [], []
    for k, part in enumerate(parts):
        # The update divides by the number of micro-batches.
        whole = [replace(part, weight=part.weight * len(parts))]
        rng = contexts.rng()
        with contexts.first():
            losses.append(evaluator.backward(whole)[0])
        if optimizer.needs_second_pass:
            optimizer.first_step()
            with contexts.second(), rng:
                perturbed_losses.append(evaluator.backward(whole)[0])
        if k < len(parts) - 1:
            optimizer.next_microbatch()
    return torch.stack(losses).mean(), torch.stack(perturbed_losses).mean() if perturbed_losses else None


def _check_options(optimizer: Any, ascent_fraction: float, scheduler: Any) -> None:
    # Lightning's wrapper is an instance of the class that it wraps, but has no attributes of its own.
    if not isinstance(optimizer, SAM) or "param_groups" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        hint = "pass its .optimizer" if isinstance(inner, SAM) else "for a step without SAM, use SAM with rho=0"
        raise TypeError(f"sam_step() needs a fused_sam optimizer, not {type(optimizer).__name__}: {hint}")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau steps by a metric, which sam_step() does not have: leave out `scheduler`, and call its "
            "step(metric) in the loop"
        )
    if optimizer.perturbed:
        raise RuntimeError(
            "sam_step() was called with perturbed weights: call second_step() to finish the step that first_step() "
            "began, or restore() to undo it"
        )
    if not 0 < ascent_fraction <= 1:
        raise ValueError(f"ascent_fraction must be above 0 and at most 1, not {ascent_fraction!r}")
    if ascent_fraction < 1 and optimizer.keeps_ascent_grad and optimizer.combines_grads:
        raise ValueError(
            f"{type(optimizer).__name__} updates the weights with the first gradient too, which ascent_fraction would "
            "compute from a part of the batch: ascent_fraction must be 1"
        )
    if ascent_fraction < 1 and optimizer.schedule is not None and optimizer.schedule.needs_gradients:
        raise ValueError(
            f"{type(optimizer.schedule).__name__} decides by the first gradient, and the update uses it on steps that "
            "do not perturb: ascent_fraction must be 1"
        )


def _check_loss(loss: PerPassLoss, optimizer: SAM, ascent_fraction: float) -> None:
    if loss.optimizer is not optimizer:
        raise ValueError(
            f"{type(loss).__name__} was made with another optimizer, whose passes are not those of this step: make it "
            "with the optimizer that sam_step() gets"
        )
    loss.check(ascent_fraction)


class Evaluator:
    """Computes the losses and gradients of a list of micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        scaler: torch.amp.GradScaler | None,
        autocast: torch.dtype | None,
        per_sample: bool,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._scaler = scaler
        self._autocast = autocast
        self._per_sample = per_sample  # True if loss_fn must return one loss per sample

    def backward(self, parts: list[MicroBatch]) -> tuple[Tensor, list[Tensor]]:
        """Add the mean loss's gradient to the parameters' gradients.

        Returns:
            The mean loss, and per micro-batch what loss_fn returned; all detached.
        """
        total: Tensor | None = None
        returned = []
        for k, part in enumerate(parts):
            # DistributedDataParallel decides in forward() whether backward() averages, so no_sync() covers both.
            last = k == len(parts) - 1
            with nullcontext() if last else getattr(self._model, "no_sync", nullcontext)():
                losses = self._forward(part)
                loss = losses.mean() * part.weight
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            returned.append(losses.detach())
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total, returned

    @torch.no_grad()
    def losses(self, parts: list[MicroBatch]) -> Tensor:
        """Return every sample's loss, without a graph."""
        return torch.cat([self._forward(part) for part in parts])

    def _forward(self, part: MicroBatch) -> Tensor:
        with self._autocast_context():
            losses = self._loss_fn(self._model, part.batch)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"loss_fn must return a tensor, the batch's mean loss or its samples' losses, not "
                f"{type(losses).__name__}: return the loss alone, and keep other outputs in a variable outside"
            )
        # An autocast region around the whole step caches casts of the weights, which are about to change.
        torch.clear_autocast_cache()
        shape = list(losses.shape)
        if self._per_sample and shape != [part.size]:
            raise ValueError(
                f"data selection (gamma below 1) needs one loss per sample, shape [{part.size}], but loss_fn returned "
                f"{shape}: use reduction='none', or gamma=1"
            )
        if len(shape) > 1 or shape == [0]:
            raise ValueError(
                f"loss_fn must return the mean loss, shape [], or one loss per sample, shape [B], not {shape}"
            )
        return losses

    def _autocast_context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        device = next(self._model.parameters()).device
        return torch.autocast(device.type, dtype=self._autocast)
