"""Batch-norm statistics count each batch once per step, because they are frozen while the weights are perturbed.

    with frozen_batch_norm(model):
        loss_fn(model(x), y).backward()      # normalises by the batch, as in training; changes no statistics
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Keep running_mean, running_var and num_batches_tracked of all layers in `model` unchanged inside `with`.

    Use it around the second pass, so that running statistics count each batch once.

    Layers in training mode still normalise by the batch's own statistics, SyncBatchNorm by those of all processes.
    Layers in eval mode, and those without running statistics, stay as they are. The context may be nested, and
    exceptions pass through it.
    """
    batch_norms = []
    instance_norms = []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            batch_norms.append(module)
        elif isinstance(module, _InstanceNorm) and module.training and module.running_mean is not None:
            instance_norms.append((module, module.running_mean, module.running_var))
    try:
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = False
        for instance_norm, mean, var in instance_norms:
            # These layers update any statistics that they hold, so give them copies.
            instance_norm.running_mean = mean.clone()
            instance_norm.running_var = None if var is None else var.clone()
        yield
    finally:
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = True
        for instance_norm, mean, var in instance_norms:
            instance_norm.running_mean, instance_norm.running_var = mean, var
