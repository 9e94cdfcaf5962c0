"""SAM makes both passes in Lightning under the Trainer's precision and strategy, in either kind of optimization.

    class Model(SAMMixin, lightning.LightningModule): ...      # nothing else changes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fused_sam.sam import SAM
from fused_sam.training import paired_closure, set_ascent_grad_scale

from .methods import displaced, refuse_method

try:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningModule
    from lightning.pytorch.core.optimizer import LightningOptimizer
except ImportError as error:
    raise ImportError("fused_sam.integrations.lightning needs Lightning: pip install 'fused_sam[lightning]'") from error


class SAMMixin:
    """Makes both of SAM's passes under Lightning's automatic optimization.

    Put it before LightningModule among the base classes, and return a fused_sam optimizer from configure_optimizers().

    Batch-norm statistics and logged values are those of the first pass, and dropout masks are the same in both.
    Precision "16-mixed" makes both passes too. Without the mixin, Lightning's gradient scaler calls step() without a
    closure, which is an update without SAM. Other optimizers are stepped as usual. The weights of one-pass methods are
    displaced within optimizer_step() alone, so that validation, averages and checkpoints get the clean ones.

    Raises:
        MisconfigurationException: accumulate_grad_batches is not 1, and Lightning keeps no batch for a second pass. Use
            manual optimization, and two_pass_step() with a closure that goes through all micro-batches.
        TypeError: MicrobatchSAM.
        ValueError: ESAM with gamma below 1.
    """

    _in_second_pass = False

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step a fused_sam optimizer in two passes, and any other one as usual. Lightning calls it."""
        module: Any = self
        sam = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(sam, SAM) or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]
            return
        if module.trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"accumulate_grad_batches is {module.trainer.accumulate_grad_batches}, but SAM's second pass needs all "
                "accumulated batches again: use manual optimization with two_pass_step(), or "
                "accumulate_grad_batches=1"
            )

        def closure() -> Any:
            self._in_second_pass = sam.perturbed
            try:
                return optimizer_closure()
            finally:
                self._in_second_pass = False

        two_pass_step(module, optimizer, closure)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as LightningModule.log() does, in the first pass only."""
        if not self._in_second_pass:
            super().log(*args, **kwargs)  # type: ignore[misc]


def two_pass_step(module: LightningModule, optimizer: LightningOptimizer, closure: Callable[[], Any]) -> Any:
    """Make a step as optimizer.step(closure) does, with both passes under any precision.

    Use it in manual optimization.

    Args:
        module: the running LightningModule.
        optimizer: one of self.optimizers(), which wraps a fused_sam optimizer.
        closure: computes the loss and calls self.manual_backward(loss), for each micro-batch if there are several.
            Gradients are cleared before each of its two runs. In the second run batch norm is frozen and random numbers
            are replayed.

    Returns:
        The result of the first run. With a gradient scaler, None, as from Lightning's own step.

    Raises:
        TypeError: the optimizer does not wrap a fused_sam optimizer, or is MicrobatchSAM.
        ValueError: ESAM with gamma below 1.
    """
    sam = optimizer.optimizer
    if not isinstance(sam, SAM):
        raise TypeError(f"two_pass_step() needs a fused_sam optimizer, not {type(sam).__name__}: use its own step()")
    refuse_method(sam, "Lightning")
    closure = paired_closure(closure, module, sam)
    with displaced(sam):
        return _both_passes(module, optimizer, sam, closure)


def _both_passes(module: LightningModule, optimizer: LightningOptimizer, sam: SAM, closure: Callable[[], Any]) -> Any:
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return optimizer.step(closure=closure)

    # With a scaler Lightning runs the closure once and steps without it, so the first pass comes before that.
    sam.zero_grad()
    loss = closure()
    set_ascent_grad_scale(sam, scaler)
    if not sam.needs_second_pass:
        return optimizer.step(closure=lambda: loss)
    sam.first_step(zero_grad=True)
    try:
        return optimizer.step(closure=closure)
    finally:
        sam.restore()  # does nothing after a completed step
