"""What the two C++ backends, cpu and cuda, share: the codes of dtypes, addresses, and the filling of a native table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Table

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/core/storage.h


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the tensors' addresses; 0 for None. A tensor without memory raises RuntimeError."""
    found = [0 if t is None else t.data_ptr() for t in tensors]
    if 0 in found:
        for t, address in zip(tensors, found, strict=True):
            if t is not None and not address and t.numel():
                raise RuntimeError(f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory")
    return found


def fill(native: Any, table: Table) -> None:
    """Write the addresses of all columns but the gradients, which move, into a native table."""
    native.set_params(addresses(table.params))
    if table.masters:
        native.set_masters(addresses(table.masters))
    else:
        native.set_backups(addresses(table.backups or table.params))
    if table.rule is not None:
        buffers = table.rule.buffers()
        for name, column in table.state.items():
            if name in buffers:
                native.set_state(buffers.index(name), addresses(column))
            else:
                native.set_steps(addresses(column))
    elif table.second_moments:
        native.set_state(0, addresses(table.second_moments))


def address_of(numbers: Tensor | None) -> int:
    """Return the address of numbers of a table's rows; 0 for None."""
    return 0 if numbers is None else numbers.data_ptr()
