"""Where the numbers of a table and of a parameter group lie in the memory that the Triton kernels read.

Host code writes the numbers without importing Triton; the kernels read them at the same places. The places of an update
rule's numbers follow from its group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from fused_sam.backends.contract import PerturbGroup, UpdateRule

# ---- a row of a table: words of 8 bytes. What every kernel reads stands in the first 64 bytes. ----------------------

PARAM = 0  # address
CLEAN = 1  # address of the unperturbed values: the master, else the backup, else the parameter itself
SIZE = 2  # elements
FIRST_BLOCK = 3
GROUP = 4  # number of the parameter group
STATE = 5  # addresses of the state buffers, 0 where the group does not use one; or of the second moment, to perturb
STEP = 8  # address of the state's scalar
RNG_STREAM = 9  # number of the stream
ROW = 16  # 128 bytes: a line of the cache


def state_place(rule: UpdateRule, name: str) -> int:
    """Return the place in a row of the address of a state column."""
    buffers = rule.buffers()
    return STATE + buffers.index(name) if name in buffers else STEP


# ---- bits of the norm kernel's flags -------------------------------------------------------------------------------

RESET = 1  # the sum starts from zero
FINISH = 2  # the norm and the skip flag are written
KEEP_SKIP = 4  # a skip flag that is already set stays

# ---- a parameter group: fp32 numbers, first those of `perturb`, then those of the table's update rule ---------------

UPDATE = 4  # place of the first number of the update rule
SEED = 30  # the table's seed of random numbers: 64 bits
GROUP_SIZE = 32


class PerturbNumbers(NamedTuple):
    """What the norm and perturb kernels read."""

    rho: float  # divided by mask_prob
    eta: float
    adaptive: bool
    mask_prob: float

    @classmethod
    def of(cls, h: PerturbGroup) -> PerturbNumbers:
        return cls(h.rho / h.mask_prob, h.eta, h.adaptive, h.mask_prob)


@cache
def update_fields(group: Any) -> tuple[str, ...]:
    """Return the names of the numbers that the kernel of an update rule reads of a group.

    `lr` and `sign` come first in every rule: copy_lrs writes lr on the device, and sign is -1 to maximize, else 1. All
    other fields follow; after a number x, also one_minus_x, and log_x for a decay rate beta.
    """
    names = ["lr", "sign"]
    for name in _own_fields(group):
        names.append(name)
        if not isinstance(group._field_defaults.get(name), bool):
            names.append(f"one_minus_{name}")
        if name.startswith("beta"):
            names.append(f"log_{name}")
    assert UPDATE + len(names) <= SEED, f"a group has no room for the numbers of {group.__name__}"
    return tuple(names)


def update_numbers(h: Any) -> list[float]:
    """Return the numbers that `update_fields` names. Subtractions from 1 are made here in double, as torch does."""
    group: Any = type(h)
    numbers = [0.0 if isinstance(h.lr, Tensor) else h.lr, -1.0 if h.maximize else 1.0]
    for name in _own_fields(group):
        x = getattr(h, name)
        numbers.append(x)
        if not isinstance(x, bool):
            numbers.append(1 - x)
        if name.startswith("beta"):
            numbers.append(math.log(x) if x > 0 else -math.inf)
    return numbers


@cache
def _own_fields(group: Any) -> tuple[str, ...]:
    return tuple(name for name in group._fields if name not in ("lr", "maximize"))


def numbers_of(h: Any) -> tuple[int, Sequence[float]]:
    """Return the place of a group's first number, and its numbers."""
    return (0, PerturbNumbers.of(h)) if isinstance(h, PerturbGroup) else (UPDATE, update_numbers(h))


LR = UPDATE
SIGN = UPDATE + 1


def place(group: Any, name: str) -> int:
    """Return the place in a group of a field of PerturbNumbers, or of a number of an update rule's group."""
    if group is PerturbNumbers:
        return PerturbNumbers._fields.index(name)
    return UPDATE + update_fields(group).index(name)
