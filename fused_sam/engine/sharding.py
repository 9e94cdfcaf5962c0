"""Weights that are spread over processes (DTensor): their local parts, and sums over all of them.

A primitive works on each process's own part. What is global is the sum of squares: every process adds up its parts,
each divided by the number of processes that hold the same numbers, and one all-reduce of one small vector makes it the
norm of the whole gradient on all of them, so that all take the same decision.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import SKIP, SUM

# Hashes of patterns are below these primes, so that sums of their squares are whole numbers that the dtype holds
# exactly: of fp32 over 266 processes, of fp64 over any.
_PATTERNS = {torch.float32: 251, torch.float64: 1_048_573}


def is_sharded(t: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second: who has a DTensor has done so
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself where it is not spread."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def like(part: Tensor, p: Tensor) -> Tensor:
    """A tensor that is spread as p is, and of which `part` is this process's part."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def gradient_of(p: Tensor) -> Tensor | None:
    """p's gradient, spread as p is."""
    g = p.grad
    if g is None or not is_sharded(p) or not is_sharded(g) or g.placements == p.placements:  # type: ignore[attr-defined]
        return g
    p.grad = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return p.grad


class Sharding:
    """How often each parameter's numbers are held, and the processes that hold them.

    Args:
        params: all parameters of an optimizer, at least one of them a DTensor.
        names: what errors call them.

    Raises:
        ValueError: meshes that do not lie within one another, or a parameter in partial sums.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        meshes = [p.device_mesh for p in params if is_sharded(p)]  # type: ignore[attr-defined]
        self._span = max(meshes, key=lambda mesh: mesh.size())
        ranks = self._span.mesh.flatten().tolist()
        self.fractions: list[float] = []  # of each parameter's local sum of squares in the global one
        for p, name in zip(params, names, strict=True):
            parts = 1
            if is_sharded(p):
                mesh = p.device_mesh  # type: ignore[attr-defined]
                if not set(mesh.mesh.flatten().tolist()) <= set(ranks):
                    raise ValueError(
                        f"{name} lies on {mesh}, which is no part of {self._span}: use one optimizer for each mesh"
                    )
                for dim, placement in enumerate(p.placements):  # type: ignore[attr-defined]
                    if placement.is_partial():
                        raise ValueError(f"{name} is in partial sums: redistribute it before giving it to SAM")
                    parts *= 1 if placement.is_replicate() else mesh.size(dim)
            self.fractions.append(parts / len(ranks))
        self._groups = self._reducing_groups()
        self._described = "; ".join(
            f"{name} {p.dtype} {getattr(p, 'placements', '')}" for p, name in zip(params, names, strict=True)
        )
        self._agreed = False
        self._pending: tuple[Tensor, Any] | None = None

    def inherit(self, old: Sharding) -> None:
        """What another one knows already: a process that plans anew by itself must not ask the others."""
        if self._described == old._described:
            self._agreed, self._pending = old._agreed, old._pending

    def _reducing_groups(self) -> list[Any]:
        """One process group where one spans the mesh, else one for each of its dimensions."""
        if self._span.size() == torch.distributed.get_world_size():
            return [torch.distributed.group.WORLD]
        return [self._span.get_group(dim) for dim in range(self._span.ndim)]

    def all_reduce(self, numbers: Tensor) -> None:
        """Sum over all processes, in place."""
        for group in self._groups:
            torch.distributed.all_reduce(numbers, group=group)

    def reduce_norm(self, status: Tensor, pattern: bytes) -> None:
        """Add status[SUM] up over all processes, and set status[SKIP] where one of them has it.

        `pattern`: which gradients this process has; all must have the same.

        Raises:
            RuntimeError: processes disagree on the parameters or on which have gradients. On an accelerator, whose
                numbers are not waited for, the step is skipped at once and the error comes with the next one.
        """
        self.agree_on_parameters()
        self._raise_if_pending()
        h = float(zlib.crc32(pattern) % _PATTERNS[status.dtype])
        skip = (status[SKIP : SKIP + 1] != 0).to(status.dtype)
        numbers = torch.cat([status[SUM : SUM + 1], skip, status.new_tensor([h, h * h])])
        self.all_reduce(numbers)
        n = self._span.size()
        first, second = numbers[2:].double()
        same = n * second - first**2 <= 0.5 + (1e-6 * n * second if n > 266 else 0)  # 0 only where all are equal
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

    def agree_on_parameters(self) -> None:
        """Once: every process must have built its optimizer over the same parameters in the same order."""
        if self._agreed:
            return
        for group in self._groups:
            everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(everyone, self._described, group=group)
            for rank, described in enumerate(everyone):
                if described != everyone[0]:
                    raise RuntimeError(
                        f"the processes' optimizers have different parameters: the first has "
                        f"{_difference(everyone[0], described)}, process {rank} {_difference(described, everyone[0])}; "
                        "build the optimizer over the same parameters in the same order everywhere"
                    )
        self._agreed = True


_DISAGREE = (
    "the processes have gradients for different parameters: every process must run backward() through the same "
    "parameters before the optimizer's steps; no weight was changed"
)


def _difference(text: str, other: str) -> str:
    """The first parameter in which a description differs from another."""
    mine, theirs = text.split("; "), other.split("; ")
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            return a
    return f"{len(mine)} parameters"
