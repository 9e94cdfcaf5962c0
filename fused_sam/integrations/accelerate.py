"""SAM works with Hugging Face accelerate's own gradient accumulation, mixed precision and skipped steps.

    step = AcceleratedSAM(accelerator, model, optimizer, loss_fn)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = step(batch)
            scheduler.step()
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from fused_sam.sam import SAM
from fused_sam.training import ReplayedRNG, frozen_batch_norm, set_ascent_grad_scale

from .methods import displaced, refuse_method

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError(
        "fused_sam.integrations.accelerate needs accelerate: pip install 'fused_sam[accelerate]'"
    ) from error


class PreparedSAM(AcceleratedOptimizer):
    """What wrapped_sam() makes of a prepared optimizer: accelerate's own, with SAM's calls and SAM's skipped steps.

    first_step(), restore(), unperturbed() and all else that accelerate's class lacks are the SAM optimizer's.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def second_step(self, zero_grad: bool = False) -> None:
        """Finish the step through accelerate's step(), which uses its GradScaler."""
        if not self.optimizer.perturbed:
            self.optimizer.second_step()  # raises the error
        self.step()
        if zero_grad:
            self.zero_grad()

    @property
    def step_was_skipped(self) -> bool:
        """True if the last step changed nothing, because a gradient was not finite."""
        return bool(self.optimizer.step_was_skipped)


def wrapped_sam(optimizer: Any) -> SAM:
    """Return the SAM optimizer inside the one that accelerate's prepare() returned.

    From then on the outer optimizer has SAM's first_step(), second_step() and its other calls, for loops with two
    passes by hand, and its step_was_skipped is SAM's `skipped`.

    Raises:
        TypeError: the optimizer is not a prepared fused_sam optimizer.
    """
    sam = getattr(optimizer, "optimizer", None)
    if not (isinstance(optimizer, AcceleratedOptimizer) and isinstance(sam, SAM)):
        found = type(optimizer).__name__ + ("" if sam is None else f" around {type(sam).__name__}")
        raise TypeError(
            f"expected a fused_sam optimizer that went through accelerator.prepare(), not {found}. "
            "A Trainer takes one as optimizers=(SAM(...), None) or optimizer_cls_and_kwargs=(SAM, {...})"
        )
    optimizer.__class__ = PreparedSAM  # schedulers and the accelerator hold this very object
    return sam


class AcceleratedSAM:
    """Makes SAM's passes and updates in a loop with accelerate.

    Call it with each micro-batch inside `accelerator.accumulate(model)`. It updates when accelerate synchronises
    gradients.

    Args:
        accelerator: the Accelerator, with your gradient_accumulation_steps and mixed_precision.
        model, optimizer: as accelerator.prepare() returned them.
        loss_fn: loss_fn(model, batch) returns the micro-batch's mean loss, a 0-dim tensor.
        freeze_batch_norm, replay_rng: as in fused_sam.training.sam_step.

    The batches of one update are kept for the second pass. A prepared scheduler may be stepped after every call. It
    does nothing before an update, nor after a skipped one, which `optimizer.step_was_skipped` reports.

    Raises:
        TypeError: the optimizer is not a prepared fused_sam optimizer, or is MicrobatchSAM; loss_fn returns no tensor.
        ValueError: ESAM with gamma below 1.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        freeze_batch_norm: bool = True,
        replay_rng: bool = True,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._sam = wrapped_sam(optimizer)
        refuse_method(self._sam, "accelerate")
        self._loss_fn = loss_fn
        self._frozen = frozen_batch_norm if freeze_batch_norm else nullcontext
        self._replays = replay_rng
        self._micro_batches: list[tuple[Any, Any]] = []  # those of this update, each with its random numbers

    def __call__(self, batch: Any) -> Tensor:
        """Run a micro-batch, update after the last one, and return the loss at the weights, detached, 0-dim."""
        if not self._micro_batches:
            self._sam.zero_grad()
        self._micro_batches.append((batch, ReplayedRNG.of(self._model) if self._replays else nullcontext()))
        try:
            with displaced(self._sam):
                loss = self._pass(batch)
                if self._accelerator.sync_gradients:
                    set_ascent_grad_scale(self._sam, self._accelerator.scaler)
                    if self._sam.needs_second_pass:
                        self._sam.first_step(zero_grad=True)
                        self._second_pass()
                    self._optimizer.step()
                    self._micro_batches.clear()
        except BaseException:
            if self._sam.perturbed:
                self._sam.restore()
            self._micro_batches.clear()
            raise
        return loss

    def _pass(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return the mean loss, a tensor, not {type(loss).__name__}: return it alone")
        self._accelerator.backward(loss)
        return loss.detach()

    def _second_pass(self) -> None:
        *earlier, last = self._micro_batches
        with self._frozen(self._model):
            for batch, rng in earlier:
                with self._accelerator.no_sync(self._model), rng:
                    self._pass(batch)
            batch, rng = last
            with rng:
                self._pass(batch)
