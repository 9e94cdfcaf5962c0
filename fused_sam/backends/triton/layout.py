"""Where the numbers of a table and of a parameter group lie in the memory that the Triton kernels read.

Host code writes the numbers without importing Triton; the kernels read them at the same places. A new update rule adds
a class next to SGDNumbers and a line in NUMBERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fused_sam.backends.contract import AdamGroup, LionGroup, PerturbGroup, SGDGroup, UpdateRule

# ---- a row of a table: words of 8 bytes. What every kernel reads stands in the first 64 bytes. ----------------------

PARAM = 0  # address
CLEAN = 1  # address of the unperturbed values: the master, else the backup, else the parameter itself
SIZE = 2  # elements
FIRST_BLOCK = 3
GROUP = 4  # number of the parameter group
STATE = 5  # addresses of the state buffers, 0 where the group does not use one
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


class SGDNumbers(NamedTuple):
    """What the sgd kernel reads. Subtractions from 1 are made here in double, as torch does."""

    lr: float  # first in every rule: copy_lrs writes it on the device
    sign: float  # second in every rule: -1 to maximize, else 1
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: bool

    @classmethod
    def of(cls, h: SGDGroup) -> SGDNumbers:
        return cls(_host_lr(h.lr), _sign(h.maximize), h.weight_decay, h.momentum, 1 - h.dampening, h.nesterov)


class AdamNumbers(NamedTuple):
    """What the adam kernel reads."""

    lr: float
    sign: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    log_beta1: float
    beta2: float
    one_minus_beta2: float
    log_beta2: float
    eps: float
    decoupled_weight_decay: bool
    amsgrad: bool

    @classmethod
    def of(cls, h: AdamGroup) -> AdamNumbers:
        return cls(
            _host_lr(h.lr), _sign(h.maximize), h.weight_decay,
            h.beta1, 1 - h.beta1, _log(h.beta1), h.beta2, 1 - h.beta2, _log(h.beta2),
            h.eps, h.decoupled_weight_decay, h.amsgrad,
        )  # fmt: skip


class LionNumbers(NamedTuple):
    """What the lion kernel reads."""

    lr: float
    sign: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float

    @classmethod
    def of(cls, h: LionGroup) -> LionNumbers:
        return cls(
            _host_lr(h.lr), _sign(h.maximize), h.weight_decay, h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2
        )  # fmt: skip


# For each kind of parameter group, the place of its first number and the function that makes its numbers.
NUMBERS: dict[type, tuple[int, Callable[[Any], tuple[float, ...]]]] = {
    PerturbGroup: (0, PerturbNumbers.of),
    SGDGroup: (UPDATE, SGDNumbers.of),
    AdamGroup: (UPDATE, AdamNumbers.of),
    LionGroup: (UPDATE, LionNumbers.of),
}

LR = UPDATE
SIGN = UPDATE + 1


def place(numbers: Any, name: str) -> int:
    """Return the place in a group of a field of PerturbNumbers or of an update rule's class."""
    first = 0 if numbers is PerturbNumbers else UPDATE
    return first + int(numbers._fields.index(name))


def _host_lr(lr: float | Tensor) -> float:
    return 0.0 if isinstance(lr, Tensor) else lr


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
