"""This module lists the parameters of an optimizer, names them in errors, and refuses those that SAM cannot take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_sam.backends.contract import LOW_PRECISION

from .sharding import is_sharded

_DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)


def drop_duplicates(group: dict[str, Any]) -> None:
    """Keep each parameter of a group once, at its first place."""
    params = group["params"]
    first = sorted({id(p): i for i, p in reversed(list(enumerate(params)))}.values())
    if len(first) < len(params):
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in first]


def device_of(groups: Sequence[dict[str, Any]]) -> torch.device:
    """Return the device of the first trainable parameter, else of the first one, else the CPU."""
    params = [p for group in groups for p in group["params"]]
    for p in params:
        if p.requires_grad and not is_lazy(p):
            return torch.device(p.device)
    return torch.device(params[0].device) if params else torch.device("cpu")


def used_parameters(groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return for each group the places of the parameters that a step can concern.

    The others stay in their groups and are not touched: lazy parameters before their first forward pass, and frozen
    ones without a gradient that SAM could not take, because of their dtype, their device, or as a tensor subclass.
    """
    device = device_of(groups)
    return [[i for i, p in enumerate(group["params"]) if not _is_left_out(p, device)] for group in groups]


def _is_left_out(p: Tensor, device: torch.device) -> bool:
    if is_lazy(p):
        return True
    if p.requires_grad or p.grad is not None:
        return False
    if p.dtype not in _DTYPES or p.device != device or p.layout is not torch.strided:
        return True
    return hasattr(type(p), "__tensor_flatten__") and not is_sharded(p)


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return the parameters' names in errors: those that the optimizer was given, else their places in the groups."""
    names = []
    for k, group in enumerate(groups):
        given = group.get("param_names")
        for i, p in enumerate(group["params"]):
            title = f"parameter {given[i]!r}" if given else f"parameter {i} of group {k}"
            names.append(f"{title} (no shape yet)" if is_lazy(p) else f"{title} (shape {tuple(p.shape)})")
    return names


def is_distributed() -> bool:
    """Return True if there are several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_parameters(params: Sequence[Tensor], names: Sequence[str], dense: Sequence[bool]) -> None:
    """Refuse parameters that SAM cannot take.

    Args:
        names: the parameters' names in errors.
        dense: True for each parameter that fills one block of memory (see layout.py).

    Raises:
        ValueError: they are on several devices, share memory, or have none.
        TypeError: one is complex or of integers, or FSDP1 shards it.
    """
    devices: dict[torch.device, int] = {}
    spans = []
    for i, p in enumerate(params):
        devices.setdefault(p.device, i)
        if getattr(p, "_fsdp_flattened", False) and is_distributed():
            raise TypeError(
                f"{names[i]} is a part of FullyShardedDataParallel (FSDP1), which does not show what the norm over all "
                "processes has to sum: shard the model by torch.distributed.fsdp.fully_shard (FSDP2), or use DDP"
            )
        if p.dtype not in _DTYPES:
            advice = (
                "store it as pairs of reals and use torch.view_as_complex in forward()"
                if p.is_complex()
                else "leave it out, as in SAM([p for p in model.parameters() if p.requires_grad], ...)"
            )
            raise TypeError(f"{names[i]} is {p.dtype}, but SAM takes weights of fp32, fp64, bf16 and fp16: {advice}")
        if p.numel():
            if p.untyped_storage().nbytes() == 0 and p.device.type != "meta":
                raise ValueError(
                    f"{names[i]} has no memory, because its model was sharded after the optimizer was built: "
                    "build the optimizer over the model's parameters after sharding it"
                )
            size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            spans.append((p.device.index or 0, p.data_ptr(), p.data_ptr() + size * p.element_size(), i))
    if len(devices) > 1:
        where = ", ".join(f"{names[i]} on {device}" for device, i in devices.items())
        raise ValueError(f"SAM takes parameters of one device, but got {where}: use one optimizer per device")
    spans.sort()
    for (device, _, end, i), (other_device, begin, _, j) in itertools.pairwise(spans):
        # Columns of one matrix are not dense: their address ranges overlap, but their elements do not.
        if device == other_device and 0 < begin < end and dense[i] and dense[j]:
            raise ValueError(
                f"{names[i]} and {names[j]} share memory, so that perturbing one would perturb the other: "
                "pass each weight once"
            )
