"""The workers' functions of the distributed tests: models distributed in every supported way, and one process alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp as fsdp2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fused_sam import SAM

from .processes import NotHereError

SIZES = (6, 16, 16, 3)  # a bias of 3 elements over 4 processes gives one process none


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(SIZES)):
        layers += [nn.Linear(a, b)] if i == 0 else [nn.Tanh(), nn.Linear(a, b)]
    return nn.Sequential(*layers).to(dtype)


def batch_of(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return torch.randn(24, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        0, 3, (24,), generator=generator
    )


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters()]
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 1e-2, "rho": 0.2},
        {"params": [p for n, p in named if n.endswith("bias")], "lr": 0.05},
    ]


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_views(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fully_shard(model: nn.Module, **options: Any) -> nn.Module:
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise NotHereError(f"FSDP2 of torch {torch.__version__} shards only on GPUs")
    return fsdp2.fully_shard(model, **options)


def fsdp(model: nn.Module) -> nn.Module:
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def fsdp_kept(model: nn.Module) -> nn.Module:
    return fully_shard(model, reshard_after_forward=False)


def hybrid(model: nn.Module) -> nn.Module:
    """Replicate over one dimension of the mesh and shard over the other."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel_and_fsdp(model: nn.Module) -> nn.Module:
    """Make two layers tensor parallel and shard all layers on a 2-D mesh. The last layer uses one dimension of it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Make two layers tensor parallel. The last layer has no DTensors and is replicated."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


# How to distribute a model, and the number of parts of each batch; 0 is one part per process.
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "ddp": (ddp, 0),
    "ddp-views": (ddp_views, 0),
    "fsdp": (fsdp, 0),
    "fsdp-kept": (fsdp_kept, 0),
    "hybrid": (hybrid, 4),
    "tensor-parallel-and-fsdp": (tensor_parallel_and_fsdp, 2),
    "tensor-parallel": (tensor_parallel, 1),
}


def part_of(batch: tuple[Tensor, Tensor], rank: int, parts: int) -> tuple[Tensor, Tensor]:
    parts = parts or distributed.get_world_size()
    number = rank * parts // distributed.get_world_size()
    return batch[0][number::parts], batch[1][number::parts]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]).double(), batch[1])


def step(model: nn.Module, optimizer: SAM, batch: tuple[Tensor, Tensor]) -> None:
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)


def train(
    rank: int, way: str | None, steps: int, cls: type[SAM], options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Return weights, state and norms after some steps. `way` None is one process with the whole batch."""
    distribute, parts = WAYS[way] if way else (lambda model: model, 1)
    model = distribute(model_of(dtype))
    optimizer = cls(groups_of(model), **options)
    norms = []
    for i in range(steps):
        batch = batch_of(i, dtype)
        step(model, optimizer, part_of(batch, rank, parts) if way else batch)
        norms.append((float(optimizer.grad_norm), float(optimizer.update_norm), bool(optimizer.skipped)))
    params = list(model.parameters())
    return {
        "weights": [full(p) for p in params],
        "state": [
            {k: full(v) if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()} for p in params
        ],
        "norms": norms,
    }


def replicated(t: Tensor) -> bool:
    return not isinstance(t, DTensor) or all(isinstance(p, Replicate) for p in t.placements)


# ---- errors and skipped steps ---------------------------------------------------------------------------------------


def train_with_inf(rank: int, way: str, half: str) -> dict[str, Any]:
    """Let process 1 overflow in one pass of the second step. Return weights and state before and after that step."""
    distribute, parts = WAYS[way]
    model = distribute(model_of())
    optimizer = SAM(groups_of(model), rho=0.1, lr=0.1, momentum=0.9)
    step(model, optimizer, part_of(batch_of(0), rank, parts))
    before = [full(p) for p in model.parameters()] + [full(s["momentum_buffer"]) for s in optimizer.state.values()]
    for this in ("first", "second"):
        loss_of(model, part_of(batch_of(1), rank, parts)).backward()
        if this == half and rank == 1:
            g = next(p.grad for p in model.parameters() if p.grad is not None and local(p.grad).numel())
            local(g).view(-1)[0] = float("inf")
        optimizer.first_step(zero_grad=True) if this == "first" else optimizer.second_step(zero_grad=True)
    skipped = bool(optimizer.skipped)
    after = [full(p) for p in model.parameters()] + [full(s["momentum_buffer"]) for s in optimizer.state.values()]
    step(model, optimizer, part_of(batch_of(2), rank, parts))
    return {"before": before, "after": after, "skipped": skipped, "last": [full(p) for p in model.parameters()]}


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def error_of(call: Callable[[], object]) -> str:
    """Return the message of the RuntimeError that the call raises, or an empty string."""
    try:
        call()
    except RuntimeError as raised:
        return str(raised)
    return ""


def gradients_missing(rank: int, which: str) -> tuple[bool, bool]:
    """Leave process 1 without one or all gradients. Return whether the error is right, and the weights unchanged."""
    model = fsdp(model_of())
    optimizer = SAM(groups_of(model), rho=0.1, lr=0.1, momentum=0.9)
    step(model, optimizer, part_of(batch_of(0), rank, 0))
    before = [local(p).clone() for p in model.parameters()]
    half = "second" if which.endswith("second") else "first"
    loss_of(model, part_of(batch_of(1), rank, 0)).backward()
    if half == "second":
        optimizer.first_step(zero_grad=True)
        loss_of(model, part_of(batch_of(1), rank, 0)).backward()
    if rank == 1:
        for p in list(model.parameters())[: 1 if which.startswith("one") else None]:
            p.grad = None
    error = error_of(optimizer.first_step if half == "first" else optimizer.second_step)
    same = all(torch.equal(local(p), w) for p, w in zip(model.parameters(), before, strict=True))
    return "gradients for different parameters" in error and not optimizer.perturbed, same


def other_parameters(rank: int) -> str:
    model = fsdp(model_of())
    params = list(model.parameters())
    optimizer = SAM(params[rank:], rho=0.1, lr=0.1)
    loss_of(model, part_of(batch_of(0), rank, 0)).backward()
    return error_of(optimizer.first_step)


def built_before_sharding(rank: int, cls: type[SAM]) -> str:
    model = model_of()
    optimizer = cls(model.parameters(), rho=0.1, lr=0.1)
    fsdp(model)
    loss_of(model, part_of(batch_of(0), rank, 0)).backward()
    return error_of(optimizer.first_step)


# ---- low precision, checkpoints, calls ------------------------------------------------------------------------------


def train_low(rank: int, way: str | None, options: dict[str, Any]) -> dict[str, Any]:
    return train(rank, way, 3, SAM, options, torch.bfloat16)


def _model_and_optimizer(way: str, options: dict[str, Any]) -> tuple[nn.Module, SAM]:
    model = WAYS[way][0](model_of())
    return model, SAM(groups_of(model), **options)


def save(rank: int, way: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train 2 steps, save, and train 2 more. Return weights and state at both points."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = _model_and_optimizer(way, options)
    for i in range(2):
        step(model, optimizer, part_of(batch_of(i), rank, WAYS[way][1]))
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    saved = _weights_and_state(model, optimizer)
    for i in range(2, 4):
        step(model, optimizer, part_of(batch_of(i), rank, WAYS[way][1]))
    return {"saved": saved, "end": _weights_and_state(model, optimizer)}


def load(rank: int, way: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load into a new model and optimizer, and train the last 2 steps. Return weights and state at both points."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = _model_and_optimizer(way, options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    weights, state = get_state_dict(model, optimizer)
    both = {"model": weights, "optimizer": state}
    checkpoint.load(both, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    loaded = _weights_and_state(model, optimizer)
    for i in range(2, 4):
        step(model, optimizer, part_of(batch_of(i), rank, WAYS[way][1]))
    return {"saved": loaded, "end": _weights_and_state(model, optimizer)}


def _weights_and_state(model: nn.Module, optimizer: SAM) -> list[Tensor]:
    found = [full(p) for p in model.parameters()]
    for p in model.parameters():
        found += [full(v) for _, v in sorted(optimizer.state[p].items()) if isinstance(v, Tensor)]
    return found


def count_collectives(rank: int, way: str) -> list[int]:
    """Return the number of elements of each all-reduce within first_step() and second_step()."""
    model, parts = WAYS[way][0](model_of()), WAYS[way][1]
    optimizer = SAM(groups_of(model), rho=0.1, lr=0.1, momentum=0.9)
    step(model, optimizer, part_of(batch_of(0), rank, parts))
    sizes: list[int] = []
    all_reduce = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    for half in (optimizer.first_step, optimizer.second_step):
        loss_of(model, part_of(batch_of(1), rank, parts)).backward()
        distributed.all_reduce = counting
        try:
            half(zero_grad=True)
        finally:
            distributed.all_reduce = all_reduce
    return sizes


def masters_follow_writes(rank: int) -> float:
    """Set a sharded bf16 model to zero and take a step of learning rate 0. Return the largest weight."""
    model = fsdp(model_of(torch.bfloat16))
    optimizer = SAM(groups_of(model), base_optimizer=torch.optim.AdamW, rho=0.1, lr=0.01, master_weights=True)
    step(model, optimizer, part_of(batch_of(0, torch.bfloat16), rank, 0))
    model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, part_of(batch_of(1, torch.bfloat16), rank, 0))
    return max(float(full(p).abs().max()) for p in model.parameters())


class PlainSGD(torch.optim.SGD):
    """A base optimizer that SAM does not fuse."""


def partial_gradient(rank: int) -> float:
    """Take a clipped step of rate 1 with a gradient in partial sums of 10. Return the replicated weight; it was 1."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    optimizer = SAM([p], PlainSGD, rho=0.0, lr=1.0, max_norm=0.1)
    p.grad = DTensor.from_local(torch.full((4,), 5.0), mesh, [Partial()])
    optimizer.step()
    return float(local(p.detach())[0])


def whole_state(rank: int) -> tuple[str, bool]:
    """Load state that is not sharded. Return the error's message, and whether the optimizer's state is still empty."""
    model = fsdp(model_of())
    optimizer = SAM(groups_of(model), rho=0.1, lr=0.1, momentum=0.9)
    alone = model_of()
    plain = torch.optim.SGD(groups_of(alone), lr=0.1, momentum=0.9)
    loss_of(alone, batch_of(0)).backward()
    plain.step()
    state = plain.state_dict()
    for group in state["param_groups"]:
        group.pop("rho", None)
    try:
        optimizer.load_state_dict(state)
    except ValueError as raised:
        return str(raised), not optimizer.state
    return "", False


def state_spread_otherwise(rank: int) -> bool:
    """Return True if a step with replicated momentum of sharded weights equals one with sharded momentum."""
    model = fsdp(model_of())
    twin = fsdp(model_of())
    optimizers = [SAM(groups_of(m), rho=0.1, lr=0.1, momentum=0.9) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        step(m, optimizer, part_of(batch_of(0), rank, 0))
    for p in model.parameters():
        entry = optimizers[0].state[p]
        buffer = entry["momentum_buffer"]
        entry["momentum_buffer"] = buffer.redistribute(buffer.device_mesh, [Replicate()])
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        step(m, optimizer, part_of(batch_of(1), rank, 0))
    return all(torch.equal(full(p), full(q)) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
