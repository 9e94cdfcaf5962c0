"""These functions cut batches along their first dimension: into micro-batches, a leading part, or selected samples.

A batch is a tensor, or a tuple, list, named tuple or mapping of batches. Anything else, and a tensor without a
dimension, goes into every part as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Holds a part of a batch and the weight of its mean loss in the mean over all parts."""

    batch: Any
    size: int | None  # number of samples; None if no tensor has a first dimension
    weight: float


def tensors(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every tensor with a first dimension; errors print the name."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors(value, f"{name}[{key!r}]")
    elif isinstance(batch, (tuple, list)):
        for k, value in enumerate(batch):
            yield from tensors(value, f"{name}[{k}]")


def size_of(batch: Any) -> int | None:
    """Return the number of samples: the first dimension of the first tensor; None without one."""
    return next((len(t) for _, t in tensors(batch)), None)


def checked_size(batch: Any, why: str) -> int:
    """Return the number of samples of a batch that must be cut.

    Args:
        why: the option that cuts the batch, with which error messages begin.

    Raises:
        ValueError: there is no tensor or no sample, or the tensors' first dimensions differ.
    """
    size = size_of(batch)
    if not size:
        raise ValueError(f"{why} needs a batch of at least one sample, and found no tensor with a first dimension")
    for name, t in tensors(batch):
        if len(t) != size:
            raise ValueError(
                f"{why} cuts the batch along its first dimension, which is {size}, but {name} has {len(t)}: "
                "cut it yourself and pass the parts as microbatches=[...]"
            )
    return size


def take(batch: Any, index: slice | Tensor) -> Any:
    """Return the samples of a slice, as views, or those of an index tensor, as copies."""

    def cut(t: Tensor) -> Tensor:
        return t[index] if isinstance(index, slice) else t.index_select(0, index.to(t.device))

    return _map_tensors(batch, cut)


def _map_tensors(batch: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return cut(batch) if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _map_tensors(value, cut) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map_tensors(value, cut) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map_tensors(value, cut) for value in batch)
    return batch


def split(batch: Any, microbatches: int | Iterable[Any]) -> list[MicroBatch]:
    """Return the batch in `microbatches` parts of nearly the same size, or the given micro-batches.

    A batch of fewer samples than that is cut into its samples.

    Raises:
        ValueError: there is no micro-batch, or the batch cannot be cut.
    """
    if isinstance(microbatches, int):
        if microbatches == 1:
            return [MicroBatch(batch, size_of(batch), 1.0)]
        size = checked_size(batch, f"microbatches={microbatches}")
        if microbatches < 1:
            raise ValueError(f"microbatches must be at least 1, not {microbatches}")
        microbatches = min(microbatches, size)  # the last batch of an epoch may be smaller
        ends = [size * k // microbatches for k in range(microbatches + 1)]
        return weighted([take(batch, slice(a, b)) for a, b in pairwise(ends)])
    if batch is not None:
        raise ValueError("pass the data once: batch=None with microbatches=[...], or a batch and a number")
    parts = list(microbatches)  # before the step draws any random number that its second pass replays
    if not parts:
        raise ValueError("microbatches holds no batch; a step needs at least one")
    return weighted(parts)


def weighted(parts: list[Any]) -> list[MicroBatch]:
    """Return micro-batches weighted by their numbers of samples, or equally if one of the numbers is not known."""
    sizes = [size_of(part) for part in parts]
    total = sum(size or 0 for size in sizes)
    if not all(sizes):
        return [MicroBatch(part, size, 1 / len(parts)) for part, size in zip(parts, sizes, strict=True)]
    return [MicroBatch(part, size, (size or 0) / total) for part, size in zip(parts, sizes, strict=True)]


def leading_samples(microbatches: list[MicroBatch], fraction: float) -> list[MicroBatch]:
    """Return the first max(1, round(fraction * B)) of all B samples."""
    sizes = [checked_size(each.batch, "ascent_fraction") for each in microbatches]
    remaining = max(1, round(fraction * sum(sizes)))
    parts = []
    for each, size in zip(microbatches, sizes, strict=True):
        if remaining > 0:
            parts.append(each.batch if size <= remaining else take(each.batch, slice(0, remaining)))
        remaining -= size
    return weighted(parts)


def selected_samples(microbatches: list[MicroBatch], index: Tensor) -> list[MicroBatch]:
    """Return the samples with these numbers, counted over all micro-batches, without micro-batches that have none."""
    if len(microbatches) == 1:  # without a wait for the device that holds the numbers
        return [MicroBatch(take(microbatches[0].batch, index), len(index), 1.0)]
    parts, first = [], 0
    for each in microbatches:
        assert each.size is not None
        local = index[(index >= first) & (index < first + each.size)] - first
        if len(local):
            parts.append(take(each.batch, local))
        first += each.size
    return weighted(parts)
