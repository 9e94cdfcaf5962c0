"""The workers' functions of other ways to spread a model: FSDP1 and ZeroRedundancyOptimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fused_sam import SAM

from . import spread


def fsdp1(rank: int, use_orig_params: bool) -> str:
    """Return the error of SAM over the parameters of FSDP1."""
    model = FullyShardedDataParallel(spread.model_of(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    try:
        SAM(model.parameters(), rho=0.1, lr=0.1)
    except TypeError as error:
        return str(error)
    return ""


def zero_redundancy_base(rank: int) -> list[Tensor]:
    """Return the weights after steps in which each process keeps a part of the base optimizer's state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns of torch.jit

    model = DistributedDataParallel(spread.model_of())
    optimizer = SAM(
        model.parameters(),
        ZeroRedundancyOptimizer,
        rho=0.1,
        optimizer_class=torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
    )
    for step in range(3):
        spread.step(model, optimizer, spread.part_of(spread.batch_of(step), rank, torch.distributed.get_world_size()))
    return [p.detach().clone() for p in model.parameters()]


def one_process() -> list[Tensor]:
    """Return the weights of the same steps of one process, with the joined batch."""
    model = spread.model_of()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    for step in range(3):
        spread.step(model, optimizer, spread.batch_of(step))
    return [p.detach().clone() for p in model.parameters()]
