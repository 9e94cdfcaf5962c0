"""A guard makes evaluating, saving or averaging a model an error while its weights are perturbed.

Averaging is one without a guard too: AveragedModel.update_parameters() is given the model, and so its parameters.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()  # all SAM optimizers
_REFUSES = "_refuses_perturbed_weights"


def refuse_averages_of_perturbed(optimizer: Any) -> None:
    """Make it an error to give this optimizer's parameters to AveragedModel.update_parameters() while perturbed."""
    _optimizers.add(optimizer)
    update = AveragedModel.update_parameters
    if not hasattr(update, _REFUSES):
        AveragedModel.update_parameters = _refusing(update)  # type: ignore[method-assign]


def _refusing(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def update_parameters(self: Any, model: nn.Module) -> Any:
        for optimizer in list(_optimizers):
            if optimizer.stepper.perturbed:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
                if any(id(p) in held for p in model.parameters()):
                    optimizer.refuse_perturbed("AveragedModel.update_parameters() was called")
        return update(self, model)

    setattr(update_parameters, _REFUSES, True)
    return update_parameters


class Guard:
    """Refuses what would use perturbed weights, until remove() is called.

    Args:
        optimizer: a SAM optimizer; refuse_perturbed() raises the error.
        model: whose forward pass in eval mode and state_dict() are checked. A copy of the model is not. If it is an
            AveragedModel, update_parameters() alone is checked, because its own weights are never perturbed.
    """

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self._handles: list[Any] = []
        self._averaged: Any = None
        this = weakref.ref(model)  # hooks are copied along with a model

        def on_forward(module: nn.Module, _: Any) -> None:
            if module is this() and not module.training and optimizer.stepper.perturbed:
                optimizer.refuse_perturbed("the model was called in eval mode")

        def on_state_dict(module: nn.Module, *_: Any) -> None:
            if module is this() and optimizer.stepper.perturbed:
                optimizer.refuse_perturbed("the model's state_dict() was called")

        if not isinstance(model, AveragedModel):
            self._handles = [
                model.register_forward_pre_hook(on_forward),
                model.register_state_dict_pre_hook(on_state_dict),
            ]
            return
        update: Any = model.update_parameters

        def update_parameters(averaged_from: nn.Module) -> None:
            if optimizer.stepper.perturbed:
                optimizer.refuse_perturbed("AveragedModel.update_parameters() was called")
            update(averaged_from)

        self._averaged = model
        model.update_parameters = update_parameters  # type: ignore[assignment, method-assign]

    def remove(self) -> None:
        """End the guard."""
        for handle in self._handles:
            handle.remove()
        if self._averaged is not None:
            vars(self._averaged).pop("update_parameters", None)
            self._averaged = None
