"""A whole SAM training step in one call: both passes, mixed precision, accumulation, batch norm, dropout, skipping.

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
from .batches import Piece, chosen, known_size, leading, pieces_of
from .local import local_perturbation
from .rng import ReplayedRNG
from .scale import set_ascent_grad_scale
from .selection import select_sharp

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step saw. All are 0-dim tensors on the model's device: reading their values waits for it."""

    loss: Tensor  # mean of the first pass, at the weights, detached
    perturbed_loss: Tensor | None  # mean of the second pass, detached; None: the step needed no second pass
    skipped: Tensor  # bool: a gradient was not finite and the update changed nothing


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
    """Clear the gradients and make one update from a batch; where the optimizer does not perturb, in one pass.

    Args:
        model: as it is called in training; DistributedDataParallel averages once a pass.
        loss_fn: loss_fn(model, batch) gives the batch's mean loss, or its samples' losses, whose mean is taken:
            `lambda model, batch: cross_entropy(model(batch[0]), batch[1])`, `lambda model, batch: model(**batch).loss`.
            It runs once for each micro-batch and pass.
        batch: whatever loss_fn takes; to be cut (microbatches, ascent_fraction, selection) a nest of tuples, lists and
            mappings whose tensors have the samples as first dimension.
        optimizer: a fused_sam optimizer, bare. MicrobatchSAM climbs and descends by every micro-batch in turn, as many
            as it has, each weighing as its samples. ESAM with gamma below 1 has its samples selected here (arXiv
            2110.03141): a forward pass without graph gives the losses at the perturbed weights, then only the selected
            samples go forward and backward: about 1/3 + gamma passes instead of 1.
        scaler: scales the losses, steps and is updated. None: no scaling.
        autocast: dtype of torch.autocast around loss_fn, on the device of the model's first parameter.
        microbatches: a number cuts the batch into that many, whose gradients are accumulated; an iterable of batches
            takes the place of `batch`, which must be None. Each weighs as its samples: for a loss that is a mean over
            samples, and layers that do not look across samples, the step is that of the whole batch.
        ascent_fraction: the gradient to climb by comes from the first max(1, round(fraction * B)) samples (partial
            batch ascent, Bahri et al., arXiv 2110.08529: 1/4). Dropout masks differ between the passes then. A step
            that does not perturb takes the whole batch. Not for GSAM, WSAM, LookSAM and AdaptiveSchedule.
        local: under DistributedDataParallel, perturb by the process's own gradient (see local_perturbation).
        freeze_batch_norm: batch-norm statistics are those of the first pass alone.
        replay_rng: the second pass draws what the first drew, from the CPU's generator and those of the model's
            devices.
        scheduler: stepped after an update that was not skipped. Asking waits for the device.

    An exception leaves the weights and the optimizer's state as they were. What the first pass counted (batch-norm
    statistics, random numbers) stays counted.

    Raises:
        TypeError: the optimizer is not SAM, or is wrapped.
        RuntimeError: the weights are perturbed already.
        ValueError: an option out of range, a batch that cannot be cut, or a loss of another shape than [] or [B].
    """
    _check(optimizer, ascent_fraction)
    if isinstance(microbatches, Integral):  # NumPy's whole numbers too
        microbatches = int(microbatches)
    share: float | None = getattr(optimizer, "selects", None)
    if isinstance(optimizer, MicrobatchSAM):
        microbatches = _checked_microbatches(optimizer, microbatches, ascent_fraction)
    if share is not None and ascent_fraction < 1:
        raise ValueError("data selection compares the loss of every sample: ascent_fraction must be 1, or gamma 1")
    pieces = pieces_of(batch, microbatches)
    if share is not None:
        for piece in pieces:
            known_size(piece.batch, "data selection")
    partial_ascent = ascent_fraction < 1 and optimizer.needs_second_pass
    ascent = leading(pieces, ascent_fraction) if partial_ascent else pieces
    passes = _Passes(model, loss_fn, scaler, autocast, per_sample=share is not None)

    optimizer.zero_grad()
    set_ascent_grad_scale(optimizer, scaler)
    frozen = partial(frozen_batch_norm, model) if freeze_batch_norm else nullcontext
    replayed = partial(ReplayedRNG.of, model) if replay_rng and not partial_ascent else nullcontext
    averaged = partial(local_perturbation, model, optimizer) if local else nullcontext
    try:
        if isinstance(optimizer, MicrobatchSAM):
            loss, perturbed_loss = _microbatches(optimizer, passes, pieces, frozen, replayed, averaged)
        else:
            rng: AbstractContextManager[Any] = replayed()
            with optimizer.first_pass(), averaged():
                loss, before = passes.gradient(ascent)
            perturbed_loss = None
            if optimizer.needs_second_pass:
                optimizer.first_step(zero_grad=True)
                with frozen():
                    if share is not None:
                        with rng:
                            after = passes.losses(pieces)
                        pieces = chosen(pieces, select_sharp(torch.cat(before), after, share))
                        rng = nullcontext()  # other samples than the first pass had: its masks do not fit them
                    with rng:
                        perturbed_loss, _ = passes.gradient(pieces)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    except BaseException:
        optimizer.restore()
        raise
    if scheduler is not None and not optimizer.step_was_skipped:
        scheduler.step()
    return StepResult(loss, perturbed_loss, optimizer.skipped)


def _checked_microbatches(
    optimizer: MicrobatchSAM, microbatches: int | Iterable[Any], ascent_fraction: float
) -> int | list[Any]:
    """The micro-batches of mSAM: as many as the optimizer has."""
    if ascent_fraction < 1:
        raise ValueError("MicrobatchSAM climbs by every micro-batch: ascent_fraction must be 1")
    k = optimizer.num_microbatches
    if isinstance(microbatches, int):
        if microbatches not in (1, k):
            raise ValueError(f"MicrobatchSAM has num_microbatches={k}, but microbatches={microbatches}: leave it out")
        return k
    parts = list(microbatches)
    if len(parts) != k:
        raise ValueError(f"MicrobatchSAM has num_microbatches={k}, but {len(parts)} micro-batches came")
    return parts


def _microbatches(
    optimizer: MicrobatchSAM,
    passes: _Passes,
    pieces: list[Piece],
    frozen: Callable[[], AbstractContextManager[Any]],
    replayed: Callable[[], AbstractContextManager[Any]],
    averaged: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor | None]:
    """Both passes of every micro-batch in turn; the means of both losses."""
    first, second = [], []
    for k, piece in enumerate(pieces):
        # The update divides by the number of micro-batches.
        whole = [replace(piece, weight=piece.weight * len(pieces))]
        rng = replayed()
        with averaged():
            first.append(passes.gradient(whole)[0])
        if optimizer.needs_second_pass:
            optimizer.first_step()
            with frozen(), rng:
                second.append(passes.gradient(whole)[0])
        if k < len(pieces) - 1:
            optimizer.next_microbatch()
    return torch.stack(first).mean(), torch.stack(second).mean() if second else None


def _check(optimizer: Any, ascent_fraction: float) -> None:
    # Lightning's wrapper passes for an instance of the class it wraps, but holds nothing itself.
    if not isinstance(optimizer, SAM) or "param_groups" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        hint = "pass its .optimizer" if isinstance(inner, SAM) else "for a step without SAM, use SAM with rho=0"
        raise TypeError(f"sam_step() needs a fused_sam optimizer, not {type(optimizer).__name__}: {hint}")
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
            "leave to a part of the batch: ascent_fraction must be 1"
        )
    if ascent_fraction < 1 and optimizer.schedule is not None and optimizer.schedule.needs_gradients:
        raise ValueError(
            f"{type(optimizer.schedule).__name__} decides by the first gradient, and the update uses it on steps that "
            "do not perturb: ascent_fraction must be 1"
        )


class _Passes:
    """Losses and gradients of a list of micro-batches."""

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
        self._per_sample = per_sample

    def gradient(self, pieces: list[Piece]) -> tuple[Tensor, list[Tensor]]:
        """Add the mean loss's gradient to the weights'; the mean and, of each piece, what loss_fn gave, detached."""
        total: Tensor | None = None
        seen = []
        for k, piece in enumerate(pieces):
            # DistributedDataParallel decides in forward() whether backward() averages: cover both.
            last = k == len(pieces) - 1
            with nullcontext() if last else getattr(self._model, "no_sync", nullcontext)():
                losses = self._evaluate(piece)
                loss = losses.mean() * piece.weight
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            seen.append(losses.detach())
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total, seen

    @torch.no_grad()
    def losses(self, pieces: list[Piece]) -> Tensor:
        """Every sample's loss."""
        return torch.cat([self._evaluate(piece) for piece in pieces])

    def _evaluate(self, piece: Piece) -> Tensor:
        with self._autocast_context():
            losses = self._loss_fn(self._model, piece.batch)
        # Casts that an autocast region around the whole step keeps are of weights that are about to move.
        torch.clear_autocast_cache()
        shape = list(losses.shape)
        if self._per_sample and shape != [piece.size]:
            raise ValueError(
                f"data selection (gamma below 1) needs one loss a sample, shape [{piece.size}], but loss_fn returned "
                f"{shape}: use reduction='none', or gamma=1"
            )
        if len(shape) > 1 or shape == [0]:
            raise ValueError(f"loss_fn must return the mean loss, shape [], or one a sample, shape [B], not {shape}")
        return losses

    def _autocast_context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        device = next(self._model.parameters()).device
        return torch.autocast(device.type, dtype=self._autocast)
