"""m-sharpness under DistributedDataParallel: each process perturbs along the gradient of its own part of the batch.

    with local_perturbation(model, optimizer):
        loss_fn(model(x), y).backward()      # not averaged over processes
    optimizer.first_step(zero_grad=True)
    loss_fn(model(x), y).backward()          # averaged as usual
    optimizer.second_step()

Foret et al., arXiv 2010.01412, use this on accelerators ("m" is the size of a process's part).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from fused_sam.engine.options import overrides
from fused_sam.sam import SAM


@contextmanager
def local_perturbation(model: nn.Module, optimizer: SAM) -> Iterator[None]:
    """Run the first pass under model.no_sync(), so that each process perturbs by its own gradient.

    Use it for m-sharpness, and to save one of two all-reduces. Put forward and backward inside `with`, with any number
    of backward passes.

    A step that does not perturb (rho 0, a schedule) has no second pass, so its gradients are averaged as usual. If
    gradients are not finite on one process, all processes must skip the update. The optimizer therefore gets the
    process group that has to agree on skipping, and keeps it for all later steps.

    Raises:
        TypeError: the model is not wrapped by DistributedDataParallel.
        ValueError: the update, an average or a schedule uses the first gradient, so that the processes' weights would
            diverge.
    """
    wrapped: Any = model
    if not (hasattr(model, "no_sync") and hasattr(model, "process_group")):
        raise TypeError(
            f"local_perturbation() needs a model in DistributedDataParallel, not {type(model).__name__}: "
            "a single process has no part of its own"
        )
    use = None
    if optimizer.keeps_ascent_grad:
        combines = optimizer.combines_grads
        use = "updates the weights with the first gradient too" if combines else "averages first gradients"
    elif overrides(type(optimizer), "descent") and optimizer.compares_passes:
        use = "has a descent() that may use the norm of the first gradient"
    if use is not None:
        raise ValueError(
            f"{type(optimizer).__name__} {use}, which a local perturbation leaves different on each process: "
            "perturb by the averaged gradient (local=False)"
        )
    schedule = optimizer.schedule
    if schedule is not None and schedule.needs_gradients:
        raise ValueError(
            f"{type(schedule).__name__} decides by the first gradient, which a local perturbation leaves different on "
            "each process. Use a schedule that counts steps, or perturb by the averaged gradient (local=False)"
        )
    optimizer.stepper.skip_process_group = wrapped.process_group
    with wrapped.no_sync() if optimizer.needs_second_pass else nullcontext():
        yield
