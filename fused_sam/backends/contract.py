"""The contract between the optimizer and the backends: what a table is, and the primitives over it.

A primitive works on all tensors of a table in one call, whatever parameter group they belong to. The numbers one
primitive leaves for the next (norm, scale, skip flag) stay in a `status` tensor on the tensors' device, so that no
primitive makes the host wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# Places in the status tensor. csrc/cpu/table.h holds the same order.
SUM = 0  # sum of squares of the tables seen so far
NORM = 1  # ||T_w g||: global norm of the gradient that perturbs
INVERSE = 2  # 1 / (NORM + eps), 0 where there is no direction
SKIP = 3  # not 0: a gradient was not finite, and no weight or momentum may change
UPDATE_NORM = 4  # global norm of the gradient that updates
STATUS_SIZE = 8

NO_ADDRESSES = array("q")
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Group(NamedTuple):
    """Hyper-parameters of one parameter group, as numbers of the host. csrc/bindings/groups.h reads this order."""

    rho: float
    adaptive: bool
    eta: float
    # Of torch.optim.SGD; an optimizer that is not fused leaves them alone.
    lr: float | Tensor = 0.0  # a tensor only on an accelerator, where reading it would make the host wait
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic and optimizer state have for weights of `dtype`: never below fp32."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def status_dtype(device: torch.device) -> torch.dtype:
    """fp64 on the CPU, fp32 on accelerators, whose kernels contain no fp64 arithmetic."""
    return torch.float64 if device.type == "cpu" else torch.float32


@dataclass(eq=False)
class Table:
    """Tensors of one device whose dtypes agree, as columns of equal length. None of them is empty.

    Unless `agreeing` is false, the tensors of a row are dense and alike in layout, so that a kernel may treat them as
    flat arrays of `weights[i].numel()` elements.
    """

    weights: list[Tensor]
    groups: list[int]  # the parameter group of each tensor
    gradient_dtype: torch.dtype
    agreeing: bool = True
    # The unperturbed weights: written by `perturb`, read by `sgd` and `restore`. A weight that was not
    # perturbed is its own backup.
    backups: list[Tensor] = field(default_factory=list)
    # fp32 (fp64 for fp64 weights); None where the group has no momentum. A buffer begins as -0.0, see `sgd`.
    momenta: list[Tensor | None] = field(default_factory=list)
    # Set before a primitive runs and dropped after it, so that gradients can be freed.
    gradients: list[Tensor] = field(default_factory=list)
    gradient_addresses: array[int] = field(default_factory=lambda: NO_ADDRESSES)  # of 64 bits each
    native: Any = None  # whatever the backend keeps for this table
    bound: Any = None  # the gradient addresses that `native` has


@dataclass(eq=False)
class Lists:
    """Columns of equal length for the primitives on gradients and kept vectors. No tensor is empty.

    Row by row the tensors are dense and alike in layout. A column has one dtype; fp64 columns stand alone. The tensors
    may be other ones at the next call if sizes and dtypes stay.
    """

    x: list[Tensor]
    y: list[Tensor]
    native: Any = None  # whatever the backend keeps for these sizes and dtypes


# Places of what `dots` adds to.
XY, XX, YY = range(3)


class Backend(ABC):
    """One way to run the primitives."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why this backend cannot run on this machine and what to do about it; None where it can."""

    @abstractmethod
    def serves(self, device: torch.device, weight: torch.dtype, gradient: torch.dtype) -> bool:
        """Whether there are kernels for tensors of these dtypes on this device."""

    @abstractmethod
    def norm(
        self,
        table: Table,
        groups: Sequence[Group],
        status: Tensor,
        *,
        scaled: bool,
        carry: bool,
        begin: bool,
        finish: bool,
        eps: float,
    ) -> None:
        """P1. Add the sum of squares of the gradients to `status[SUM]`, in fp32 or wider.

        scaled: of T_w g (for `perturb`), and `finish` writes NORM and INVERSE; else of g (for the update), and
        `finish` writes UPDATE_NORM. `begin` starts from zero. `finish` also writes SKIP: 1 where the sum is not
        finite, or, with `carry`, where SKIP was set before; else 0.
        """

    @abstractmethod
    def perturb(self, table: Table, groups: Sequence[Group], status: Tensor) -> None:
        """P2. Copy weights to backups; then, unless SKIP is set, w += rho * INVERSE * T_w^2 g."""

    @abstractmethod
    def sgd(self, table: Table, groups: Sequence[Group], status: Tensor, grad_scale: Tensor | None) -> None:
        """P3. One step of torch.optim.SGD from the backups into the weights.

        Momentum that is -0.0 has never been written and takes the gradient whole, as torch's first step does; without
        dampening that is the ordinary formula. No momentum is ever written as -0.0 where there is dampening.
        Where SKIP is set the backups are copied to the weights, bit for bit, and no momentum is touched.
        `grad_scale`: one number, mixed precision's loss scale, by which every gradient is divided first.
        """

    @abstractmethod
    def restore(self, table: Table) -> None:
        """Copy backups to weights, bit for bit."""

    @abstractmethod
    def dots(self, lists: Lists, sums: Tensor, *, begin: bool) -> None:
        """P4. Add <x, y>, ||x||^2 and ||y||^2 over all rows to `sums[XY]`, `sums[XX]`, `sums[YY]`, in one pass.

        `sums` is of `status_dtype` and on the tensors' device; `begin` starts from zero.
        """

    @abstractmethod
    def combine(self, lists: Lists, out: list[Tensor], coefficients: Tensor) -> None:
        """P5. out = a * x + b * y with a, b = coefficients[0], coefficients[1], of `status_dtype` and on the device.

        `out` may be `lists.x` or `lists.y`, or a third column of either's dtype. Where a coefficient is 0 its column
        counts for nothing, even where it is not finite.
        """

    @abstractmethod
    def average(self, lists: Lists, decay: float) -> None:
        """P6. x = decay * x + (1 - decay) * y: an exponential moving average x of y."""
