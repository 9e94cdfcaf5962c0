"""Weights may be sharded over processes (DTensor). This module gives their local parts, and sums over all processes.

A primitive works on each process's own part. Only the sum of squares is global. Every process adds up its parts, each
divided by the number of processes that hold the same numbers. One all-reduce of one small vector gives all processes
the norm of the whole gradient, so that all make the same decision.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import SKIP, SUM

# Hashes of gradient patterns are below these primes. Sums of their squares are then whole numbers that the dtype holds
# exactly: fp32 over up to 266 processes, fp64 over any number.
_HASH_PRIMES = {torch.float32: 251, torch.float64: 1_048_573}


def is_sharded(t: Tensor) -> bool:
    """Return True if the tensor is a DTensor."""
    # Importing the module takes a second, and a program with a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; the tensor itself if it is not sharded."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def like(part: Tensor, p: Tensor) -> Tensor:
    """Return a tensor that is sharded as p is, with `part` as this process's part."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def positions_of(p: Tensor) -> Tensor:
    """Return where the elements of this process's part of a DTensor lie in the whole: int64, of the part's shape."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, starts = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    part = local(p)
    found = torch.zeros((), dtype=torch.int64, device=part.device)
    for dim, (start, size, stride) in enumerate(zip(starts, part.shape, p.stride(), strict=True)):
        along = stride * torch.arange(start, start + size, device=part.device)
        found = found + along.view([-1 if d == dim else 1 for d in range(part.dim())])
    return found


def sums_of_rows(p: Tensor, values: Tensor) -> Tensor:
    """Return the sum of each row of `values`, this process's part of something that is sharded as p is: [rows, 1, ...].

    A row is all that has one place in the first dimension.
    """
    sums = values.sum(dim=tuple(range(1, values.dim())), keepdim=True)
    if is_sharded(p):
        for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
            if placement.is_shard() and not placement.is_shard(0):
                torch.distributed.all_reduce(sums, group=p.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    return sums


def gradient_of(p: Tensor) -> Tensor | None:
    """Return the gradient of p, sharded as p is."""
    g = p.grad
    if g is None or not is_sharded(p) or not is_sharded(g) or g.placements == p.placements:  # type: ignore[attr-defined]
        return g
    p.grad = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return p.grad


class Sharding:
    """Holds how the parameters are sharded, and reduces sums over the processes that hold them.

    Args:
        params: all parameters of an optimizer, at least one of them a DTensor.
        names: the parameters' names in errors.

    Raises:
        ValueError: no mesh contains all others, or a parameter holds partial sums.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        meshes = [p.device_mesh for p in params if is_sharded(p)]  # type: ignore[attr-defined]
        self._mesh = max(meshes, key=lambda mesh: mesh.size())  # the one that contains all others
        ranks = self._mesh.mesh.flatten().tolist()
        self.fractions: list[float] = []  # what the global sum of squares multiplies each local one by
        for p, name in zip(params, names, strict=True):
            parts = 1
            if is_sharded(p):
                mesh = p.device_mesh  # type: ignore[attr-defined]
                if not set(mesh.mesh.flatten().tolist()) <= set(ranks):
                    raise ValueError(
                        f"{name} is on {mesh}, which is not a part of {self._mesh}: use one optimizer per mesh"
                    )
                for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                    if placement.is_partial():
                        raise ValueError(f"{name} holds partial sums: redistribute it before you pass it to SAM")
                    parts *= 1 if placement.is_replicate() else mesh.size(dim)
            self.fractions.append(parts / len(ranks))
        self._groups = self._reducing_groups()
        self._described = "; ".join(
            f"{name} {p.dtype} {getattr(p, 'placements', '')}" for p, name in zip(params, names, strict=True)
        )
        self._checked = False  # True once all processes were found to have the same parameters
        self._pending: tuple[Tensor, Any] | None = None  # a result on its way to the host, and the event that ends it

    def inherit(self, old: Sharding) -> None:
        """Take over what another instance has checked, so that a process can make a new plan without the others."""
        if self._described == old._described:
            self._checked, self._pending = old._checked, old._pending

    def _reducing_groups(self) -> list[Any]:
        """Return the process groups to reduce over: the world if the mesh covers it, else one per mesh dimension."""
        if self._mesh.size() == torch.distributed.get_world_size():
            return [torch.distributed.group.WORLD]
        return [self._mesh.get_group(dim) for dim in range(self._mesh.ndim)]

    def all_reduce(self, numbers: Tensor) -> None:
        """Sum the numbers over all processes, in place."""
        for group in self._groups:
            torch.distributed.all_reduce(numbers, group=group)

    def reduce_norm(self, status: Tensor, pattern: bytes) -> None:
        """Sum status[SUM] over all processes, and set status[SKIP] if one of them has set it.

        Args:
            pattern: says which parameters have gradients on this process; must be the same on all.

        Raises:
            RuntimeError: processes have different parameters, or gradients for different ones. On an accelerator the
                host does not wait for the numbers. The step is skipped at once, and the error comes with the next one.
        """
        self.check_same_parameters()
        self._raise_if_pending()
        h = float(zlib.crc32(pattern) % _HASH_PRIMES[status.dtype])
        skip = (status[SKIP : SKIP + 1] != 0).to(status.dtype)
        numbers = torch.cat([status[SUM : SUM + 1], skip, status.new_tensor([h, h * h])])
        self.all_reduce(numbers)
        n = self._mesh.size()
        first, second = numbers[2:].double()
        same = n * second - first**2 <= 0.5 + (1e-6 * n * second if n > 266 else 0)  # 0 only if all are equal
        if status.device.type == "cpu":
            if not bool(same):
                raise RuntimeError(_DISAGREE)
        else:
            self._check_later(same)
        status[SUM] = torch.where(same, numbers[0], torch.full_like(numbers[0], torch.nan))
        status[SKIP] = numbers[1]

    def _check_later(self, same: Tensor) -> None:
        on_host = same.to("cpu", non_blocking=True)
        event = torch.get_device_module(same.device).Event()
        event.record()
        self._pending = on_host, event

    def _raise_if_pending(self) -> None:
        if self._pending is not None and self._pending[1].query():
            same, self._pending = self._pending[0], None
            if not bool(same):
                raise RuntimeError(_DISAGREE)

    def check_same_parameters(self) -> None:
        """Check once that every process has built its optimizer over the same parameters in the same order."""
        if self._checked:
            return
        for group in self._groups:
            descriptions: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(descriptions, self._described, group=group)
            for rank, described in enumerate(descriptions):
                if described != descriptions[0]:
                    raise RuntimeError(
                        f"the processes' optimizers have different parameters: the first process has "
                        f"{_difference(descriptions[0], described)}, process {rank} has "
                        f"{_difference(described, descriptions[0])}. "
                        "Build every optimizer over the same parameters in the same order"
                    )
        self._checked = True


_DISAGREE = (
    "the processes have gradients for different parameters: every process must run backward() through the same "
    "parameters before the optimizer's steps. No weight was changed"
)


def _difference(text: str, other: str) -> str:
    """Return the first parameter in which a description differs from another."""
    mine, theirs = text.split("; "), other.split("; ")
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            return a
    return f"{len(mine)} parameters"
