"""m-sharpness under DistributedDataParallel: each process climbs along the gradient of its own part of the batch.

    with local_perturbation(model, optimizer):
        loss_fn(model(x), y).backward()      # not averaged over processes
    optimizer.first_step(zero_grad=True)
    loss_fn(model(x), y).backward()          # averaged, as ever
    optimizer.second_step()

Foret et al., arXiv 2010.01412, use this on accelerators ("m" is the size of a process's part).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from fused_sam.sam import SAM


@contextmanager
def local_perturbation(model: nn.Module, optimizer: SAM) -> Iterator[None]:
    """Cover the first pass, forward and backward, with model.no_sync(); any number of backward passes.

    A step that does not perturb (rho 0, a schedule) has no second pass: its gradients are averaged as ever.
    Gradients that are not finite on one process must stop the update on all: the optimizer is told the process group
    that has to agree on skipping, and keeps it for all steps to come.

    Raises:
        TypeError: the model is not wrapped by DistributedDataParallel.
        ValueError: the update itself uses the first gradient, an average or a schedule does: processes would part.
    """
    wrapped: Any = model
    if not (hasattr(model, "no_sync") and hasattr(model, "process_group")):
        raise TypeError(
            f"local_perturbation() needs a model in DistributedDataParallel, not {type(model).__name__}: "
            "one process alone has no part of its own"
        )
    if optimizer.keeps_ascent_grad:
        use = "updates the weights with the first gradient too" if optimizer.combines_grads else "averages first gradients"
        raise ValueError(
            f"{type(optimizer).__name__} {use}, which a local perturbation leaves different on each process: "
            "perturb by the averaged gradient (local=False)"
        )
    schedule = optimizer.schedule
    if schedule is not None and schedule.needs_gradients:
        raise ValueError(
            f"{type(schedule).__name__} decides by the first gradient, which a local perturbation leaves different on "
            "each process: take a schedule that counts steps, or perturb by the averaged gradient (local=False)"
        )
    optimizer.stepper.skip_process_group = wrapped.process_group
    with wrapped.no_sync() if optimizer.needs_second_pass else nullcontext():
        yield
