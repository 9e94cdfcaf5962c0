"""The workers' functions of other ways to spread a model: FSDP1, ZeroRedundancyOptimizer, Muon under FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fused_sam import SAM, MuonWithAdamW

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


def muon(rank: int, way: str | None) -> tuple[list[Tensor], list[float]]:
    """Return the weights and norms of steps of SAM around MuonWithAdamW. `way` None is one process with all data."""
    distribute, parts = spread.WAYS[way] if way else (lambda model: model, 1)
    model = distribute(spread.model_of())
    optimizer = SAM(model.parameters(), MuonWithAdamW, rho=0.1, lr=0.02, adamw_lr=0.01, ns_steps=1)
    norms = []
    for step in range(3):
        batch = spread.batch_of(step)
        spread.step(model, optimizer, spread.part_of(batch, rank, parts) if way else batch)
        norms.append(float(optimizer.grad_norm))
    return [spread.full(p) for p in model.parameters()], norms
