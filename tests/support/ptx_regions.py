"""The memory of tensors, as the interpreter of PTX checks accesses against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fused_sam.backends.contract import Table

from .ptx import Region


def regions_of(name: str, tensors: Iterable[Any]) -> list[Region]:
    """Return the memory of the dense tensors in a column, with their names in errors. Other things have none."""
    return [
        Region(t.data_ptr(), t.numel() * t.element_size(), f"{name}[{i}]")
        for i, t in enumerate(tensors)
        if isinstance(t, Tensor)
    ]


def table_regions(table: Table) -> list[Region]:
    """Return the memory of all columns of a table."""
    columns: dict[str, Sequence[Any]] = {
        name: getattr(table, name) for name in ("params", "backups", "masters", "grads", "second_moments")
    }
    columns |= {"factors": [table.factors], "unbias": [table.unbias]}
    return [region for name, column in {**columns, **table.state}.items() for region in regions_of(name, column)]
