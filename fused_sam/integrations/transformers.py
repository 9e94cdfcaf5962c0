"""SAM trains in Hugging Face transformers' Trainer, with accumulation, mixed precision and checkpoints.

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
    from .methods import displaced, refuse_method
except ImportError as error:
    raise ImportError(
        "fused_sam.integrations.transformers needs transformers and accelerate: pip install 'fused_sam[transformers]'"
    ) from error


class SAMTrainerMixin:
    """Adds SAM's second pass to a Trainer or a subclass of it.

    Put it before that class among the base classes, and give the Trainer a fused_sam optimizer.

    The last training_step() of an update perturbs the weights and goes through the update's micro-batches again.
    Trainer's own clipping, optimizer.step() and scheduling then use the second gradient. The reported loss is the first
    pass's. In the second pass batch norm is frozen and dropout masks are replayed. A skipped update does not step the
    scheduler. The weights of one-pass methods are clean between updates, for evaluating and saving.

    Raises:
        TypeError: the Trainer's optimizer is not a fused_sam optimizer, or is MicrobatchSAM.
        ValueError: ESAM with gamma below 1.
    """

    _micro_batches: list[tuple[Any, ReplayedRNG]]  # those of this update, each with its random numbers

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer.train() does."""
        self._micro_batches = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch, and after the last one of an update the second pass. Trainer calls it."""
        trainer: Any = self
        sam = wrapped_sam(trainer.optimizer)
        refuse_method(sam, "Trainer")

        def one_pass(inputs: dict[str, Any]) -> Tensor:
            return super(SAMTrainerMixin, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

        self._micro_batches.append((inputs, ReplayedRNG.of(model)))
        with displaced(sam):
            loss = one_pass(inputs)
        if not trainer.accelerator.sync_gradients:
            return loss
        micro_batches, self._micro_batches = self._micro_batches, []
        set_ascent_grad_scale(sam, trainer.accelerator.scaler)
        if not sam.needs_second_pass:
            return loss
        sam.first_step(zero_grad=True)
        try:
            with frozen_batch_norm(model):
                for k, (inputs, rng) in enumerate(micro_batches):
                    last = k == len(micro_batches) - 1
                    with nullcontext() if last else trainer.accelerator.no_sync(model), rng:
                        one_pass(inputs)
        except BaseException:
            sam.restore()
            raise
        return loss


class SAMTrainer(SAMTrainerMixin, Trainer):
    """Trains with SAM as transformers.Trainer: pass `optimizers=(SAM(...), None)` or `optimizer_cls_and_kwargs`."""
