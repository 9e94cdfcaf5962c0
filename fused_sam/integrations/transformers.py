"""SAM in Hugging Face transformers' Trainer: the second pass, with accumulation, mixed precision and checkpoints.

    SAMTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(fused_sam.SAM, {"lr": 0.1, "rho": 0.05}))
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from fused_sam.training import ReplayedRNG, frozen_batch_norm, set_ascent_grad_scale

try:
    from transformers import Trainer

    from .accelerate import wrapped_sam
except ImportError as error:
    raise ImportError(
        "fused_sam.integrations.transformers needs transformers and accelerate: pip install 'fused_sam[transformers]'"
    ) from error


class SAMTrainerMixin:
    """Goes before Trainer or a subclass of it, whose optimizer is a fused_sam one.

    The last training_step() of an update climbs and goes through the update's micro-batches again, so that Trainer's
    own clipping, optimizer.step() and scheduling find the second gradient. The loss reported is the first pass's.
    Batch norm is frozen and dropout masks are replayed in the second pass. A skipped update holds the scheduler.

    Raises:
        TypeError: the Trainer's optimizer is not a fused_sam optimizer.
    """

    _seen: list[tuple[Any, ReplayedRNG]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._seen = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        trainer: Any = self
        sam = wrapped_sam(trainer.optimizer)

        def one_pass(inputs: dict[str, Any]) -> Tensor:
            return super(SAMTrainerMixin, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

        self._seen.append((inputs, ReplayedRNG.of(model)))
        loss = one_pass(inputs)
        if not trainer.accelerator.sync_gradients:
            return loss
        seen, self._seen = self._seen, []
        set_ascent_grad_scale(sam, trainer.accelerator.scaler)
        if not sam.needs_second_pass:
            return loss
        sam.first_step(zero_grad=True)
        try:
            with frozen_batch_norm(model):
                for k, (inputs, rng) in enumerate(seen):
                    last = k == len(seen) - 1
                    with nullcontext() if last else trainer.accelerator.no_sync(model), rng:
                        one_pass(inputs)
        except BaseException:
            sam.restore()
            raise
        return loss


class SAMTrainer(SAMTrainerMixin, Trainer):
    """transformers.Trainer that trains with SAM; pass `optimizers=(SAM(...), None)` or `optimizer_cls_and_kwargs`."""
