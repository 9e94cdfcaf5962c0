"""The base class of losses that differ between the two passes of a step: fused_sam.training.losses has them.

    loss = losses.Functional(optimizer)
    sam_step(model, loss, (inputs, targets), optimizer)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_sam.backends.contract import LOW_PRECISION
from fused_sam.methods.displaced import DisplacedSAM
from fused_sam.sam import SAM

Criterion = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass
class FirstPass:
    """Holds what the second pass of a micro-batch needs from the first one."""

    outputs: Tensor | None
    used: bool = False  # True if a backward pass went through the first pass's loss


class PerPassLoss:
    """A loss with another gradient in each pass of a step: `loss(model, (inputs, targets))` returns a 0-dim tensor.

    Use one of its subclasses as the loss of sam_step(), of a closure or of a loop with first_step() and second_step().
    The optimizer tells the passes apart: before first_step() it is the first pass, after it the second one. Call the
    loss once per micro-batch and pass, with the micro-batches in one order. Under torch.no_grad() it is the criterion.

    To write one, override `first` and `second`, which return 0-dim losses. See docs/losses.md.

    Args:
        optimizer: the fused_sam optimizer that takes the steps, without a framework's wrapper.
        criterion: criterion(outputs, targets) returns the ordinary loss, as a mean or one loss per sample. None:
            cross-entropy.
        forward: forward(model, inputs) returns the outputs, a tensor. None: model(inputs).

    Outputs in bf16 and fp16 become fp32 before the loss. Between two steps nothing is kept, so a checkpoint needs
    nothing of a loss.

    Raises:
        TypeError: the optimizer is not a fused_sam optimizer, or is wrapped, or makes one pass as MomentumSAM does;
            the batch is no pair; the outputs are no tensor.
        ValueError: the optimizer selects samples between the passes (ESAM with gamma below 1), or has none of the
            model's parameters; the second pass has outputs of another shape.
        RuntimeError: the call is inside `with optimizer.unperturbed()`, or in a second pass without its first one.
    """

    keeps_outputs: ClassVar[bool] = True
    """True if the second pass uses the outputs of the first one."""

    def __init__(self, optimizer: SAM, criterion: Criterion | None = None, forward: Forward | None = None) -> None:
        check_optimizer(optimizer, type(self).__name__)
        self.optimizer = optimizer
        self._criterion = cross_entropy if criterion is None else criterion
        self._forward = forward
        self._models: WeakSet[nn.Module] = WeakSet()  # that hold parameters of the optimizer
        self._first_passes: deque[FirstPass] = deque()  # of this step, by micro-batch
        self._step = -1  # the step that they belong to
        self._in_second_pass = False
        self.check()

    def first(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the first pass. Its gradient is the direction of the perturbation."""
        return self.criterion(outputs, targets)

    def second(self, outputs: Tensor, targets: Tensor, earlier: Tensor | None) -> Tensor:
        """Return the loss of the second pass, whose gradient updates the weights.

        Args:
            earlier: the outputs of the first pass, detached; None if the class sets keeps_outputs = False.
        """
        return self.criterion(outputs, targets)

    def check(self, ascent_fraction: float = 1.0) -> None:
        """Raise ValueError if a step of this optimizer has no two passes over the same samples."""
        name = type(self).__name__
        if getattr(self.optimizer, "selected_fraction", None) is not None:
            raise ValueError(
                f"{name} needs both passes over the same samples, and {type(self.optimizer).__name__} selects samples "
                "between them: use gamma=1"
            )
        if ascent_fraction < 1 and self.keeps_outputs:
            raise ValueError(
                f"{name} compares the outputs of both passes, and the first one has a part of the batch: "
                "ascent_fraction must be 1"
            )

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the ordinary loss, a mean."""
        return self._criterion(outputs, targets).mean()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(
                f"{type(self).__name__} takes (inputs, targets), not {type(batch).__name__}: make a pair of the batch, "
                "and let forward(model, inputs) unpack the inputs"
            )
        inputs, targets = batch
        if not torch.is_grad_enabled():
            return self.criterion(self._outputs(model, inputs), targets)
        self.check()
        self._check_model(model)
        stepper = self.optimizer.stepper
        if stepper.suspended:
            raise RuntimeError(
                f"{type(self).__name__} was called inside `with optimizer.unperturbed()`, which belongs to neither "
                "pass: evaluate under torch.no_grad(), or leave the block first"
            )
        if not self.optimizer.perturbed:
            return self._in_first_pass(self._outputs(model, inputs), targets)
        earlier = self._recall()
        outputs = self._outputs(model, inputs)
        if earlier is not None and earlier.shape != outputs.shape:
            raise ValueError(
                f"{type(self).__name__} got outputs of shape {list(earlier.shape)} in the first pass and of shape "
                f"{list(outputs.shape)} in the second: both passes need the same micro-batches in the same order"
            )
        return self.second(outputs, targets, earlier)

    # ---- the two passes -------------------------------------------------------------------------------------

    def _in_first_pass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.first(outputs, targets)
        if not loss.requires_grad:
            return loss
        if self._step != self.optimizer.stepper.steps_ended or self._in_second_pass:
            self._first_passes.clear()
            self._step, self._in_second_pass = self.optimizer.stepper.steps_ended, False
        found = FirstPass(outputs.detach().clone() if self.keeps_outputs else None)
        self._first_passes.append(found)

        def note(_: Tensor) -> None:
            found.used = True

        loss.register_hook(note)
        return loss

    def _recall(self) -> Tensor | None:
        """Return the outputs of this micro-batch's first pass."""
        first_passes = self._first_passes
        if not self._in_second_pass:  # losses that were computed for something else, such as a log, do not count
            self._in_second_pass = True
            self._first_passes = first_passes = deque(found for found in first_passes if found.used)
        if not self.keeps_outputs:
            return None
        if self._step != self.optimizer.stepper.steps_ended or not first_passes:
            raise RuntimeError(
                f"{type(self).__name__} is in a second pass, and this micro-batch had no first pass with it: both "
                "passes need this loss, and the same micro-batches in the same order. If a loop skips a batch after "
                "first_step(), call restore() there"
            )
        return first_passes.popleft().outputs

    def first_pass_waits(self) -> bool:
        """Return True if the gradients of this step's first pass are there and the weights are not perturbed yet."""
        current = self._step == self.optimizer.stepper.steps_ended and not self._in_second_pass
        return current and not self.optimizer.perturbed and any(found.used for found in self._first_passes)

    # ---- checks ---------------------------------------------------------------------------------------------

    def _outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        outputs = model(inputs) if self._forward is None else self._forward(model, inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{type(self).__name__} needs the model's outputs as one tensor, not {type(outputs).__name__}: pass "
                "forward=lambda model, inputs: ... that returns it"
            )
        return outputs.float() if outputs.dtype in LOW_PRECISION else outputs

    def _check_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or model in self._models:
            return
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in own for p in model.parameters()):
            raise ValueError(
                f"the optimizer that {type(self).__name__} was made with has none of the model's parameters, so its "
                "passes are not those of this model: make the loss with the optimizer that takes the steps"
            )
        self._models.add(model)


def check_optimizer(optimizer: Any, name: str) -> None:
    """Raise TypeError unless steps of the optimizer have two passes that can be told apart.

    Args:
        name: what needs it, with which the error begins.
    """
    # A framework's wrapper may be an instance of the class that it wraps, but has no attributes of its own.
    if not isinstance(optimizer, SAM) or "param_groups" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        hint = "pass its .optimizer" if isinstance(inner, SAM) else "a plain optimizer has no second pass"
        raise TypeError(f"{name} needs a fused_sam optimizer, not {type(optimizer).__name__}: {hint}")
    if isinstance(optimizer, DisplacedSAM):
        raise TypeError(
            f"{name} differs between two passes, and a step of {type(optimizer).__name__} has one, at displaced "
            "weights: use SAM or another method of two passes"
        )


def with_value(loss: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with the gradient of `loss` and the value of `value`."""
    return loss - loss.detach() + value.detach()
