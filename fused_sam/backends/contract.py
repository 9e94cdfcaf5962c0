"""The contract between the engine and the backends: the table of tensors, the status, and the primitives over them.

A primitive works on all tensors of a table in one call, in whatever parameter group they are. The numbers that one
primitive leaves for the next (norm, skip flag) stay in a `Status` on the tensors' device, so that the host never waits
for the device.

    SAM step      norm, perturb, second backward pass, norm (the check that the new gradients are finite), update
    per tensor    squares in place of the first norm, and a factor per row in perturb
    update        undo the perturbation and take one step of the base optimizer's rule, in one pass
    methods       dot, axpby, ema: over two vectors, such as the two gradients of a step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# Places in the status. csrc/core/status.h holds the same order.
SUM, ASCENT_NORM, INVERSE_NORM, SKIP, UPDATE_NORM, RNG_OFFSET, PERTURBED, UPDATED, SKIPPED_STEPS = range(9)
STATUS_SIZE = 9

# What random numbers are drawn for: part of the number of their stream, see rng.py and csrc/core/rng.h. Kernels draw
# all but the last, which are normal numbers of methods (engine/noise.py).
MASK, ROUND_PERTURBED, ROUND_UPDATED, NOISE = range(4)

# Places of the results of `dot`.
XY, XX, YY = range(3)

NO_ADDRESSES = array("q")
LOW_PRECISION = (torch.bfloat16, torch.float16)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic and optimizer state for parameters of `dtype`: never below fp32."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def status_dtype(device: torch.device) -> torch.dtype:
    """Return fp64 for the CPU, and fp32 for accelerators, whose kernels contain no fp64 arithmetic."""
    return torch.float64 if device.type == "cpu" else torch.float32


def _version_bumper() -> Callable[[list[Tensor]], None]:
    """Return the fastest form of torch.autograd.graph.increment_version that this machine has."""
    in_torch = _torchs_version_bumper()
    try:
        from fused_sam import _cpu  # type: ignore[attr-defined]
    except ImportError:
        return in_torch
    compiled: Callable[[list[Tensor]], None] = _cpu.VersionBumper(torch._C.TensorBase, in_torch, torch.empty(0))
    return compiled


def _torchs_version_bumper() -> Callable[[list[Tensor]], None]:
    """Return torch's C function if it takes many tensors at once, else a loop over its public form."""
    in_one_call: Callable[[list[Tensor]], None] | None = getattr(torch._C, "_increment_version", None)
    if in_one_call is not None:
        try:
            in_one_call([])
            return in_one_call
        except (TypeError, RuntimeError):  # an older torch takes one tensor at a time
            pass

    def one_by_one(tensors: list[Tensor]) -> None:
        for t in tensors:
            increment_version(t)

    return one_by_one


# Raise the version counters of tensors that a kernel wrote through their address. Autograd then raises an error for a
# graph that had saved the old values.
bump_versions = _version_bumper()


# ---- hyper-parameters of one parameter group, as numbers on the host; csrc/bindings/groups.h reads these orders ----


class PerturbGroup(NamedTuple):
    """What `norm` and `perturb` read of a parameter group."""

    rho: float  # length of the perturbation
    adaptive: bool = False  # True if the perturbation is scaled by the weights (ASAM)
    eta: float = 0.0  # ASAM's offset; in a table with second moments, Adam's eps
    mask_prob: float = 1.0  # share of the elements that are perturbed, drawn at random (ESAM's beta)


class SGDGroup(NamedTuple):
    """Options of torch.optim.SGD."""

    lr: float | Tensor  # a tensor only on an accelerator, where reading it would make the host wait
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class AdamGroup(NamedTuple):
    """Options of torch.optim.Adam and AdamW."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False  # True for AdamW
    amsgrad: bool = False
    maximize: bool = False


class LionGroup(NamedTuple):
    """Options of fused_sam.Lion."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    maximize: bool = False


# ---- the update rules of fused base optimizers, as data -------------------------------------------------------------


class StateColumn(NamedTuple):
    """One tensor of optimizer state per parameter."""

    name: str  # as in optimizer.state[param]
    init: float = 0.0
    scalar: bool = False  # True if it is one fp32 number on the parameter's device, not of the parameter's shape


class UpdateRule(NamedTuple):
    """A base optimizer that backends fuse with the undo. `name` names its kernels."""

    name: str
    group: type[Any]  # a named tuple of a group's hyper-parameters: `lr` first, `maximize` last
    columns: tuple[StateColumn, ...]

    def buffers(self) -> tuple[str, ...]:
        """Return the names of the columns that have the parameter's shape, in the order of a native table's slots."""
        return tuple(column.name for column in self.columns if not column.scalar)


# torch.optim.SGD. A momentum of -0.0 has never been written and takes the gradient whole, as torch's first step does;
# without dampening that is the ordinary formula. With dampening no momentum is ever written as -0.0.
SGD = UpdateRule("sgd", SGDGroup, (StateColumn("momentum_buffer", init=-0.0),))
# torch.optim.Adam, or AdamW where the decay is decoupled. An update adds 1 to `step`.
ADAM = UpdateRule(
    "adam",
    AdamGroup,
    (
        StateColumn("step", scalar=True),
        StateColumn("exp_avg"),
        StateColumn("exp_avg_sq"),
        StateColumn("max_exp_avg_sq"),
    ),
)
# Lion (arXiv 2302.06675, algorithm 2):
#     w = w - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * w);  m = beta2 * m + (1 - beta2) * g
LION = UpdateRule("lion", LionGroup, (StateColumn("exp_avg"),))

RULES = (SGD, ADAM, LION)


# ---- what the primitives work on ------------------------------------------------------------------------------------


class Status:
    """The numbers that primitives leave for each other: a view, with names, of one small vector.

    Attributes:
        values: shape (STATUS_SIZE,), on the parameters' device; fp64 on the CPU, fp32 elsewhere.
        address: of the first number.
        host: the same memory as an array, on the CPU; None elsewhere.
        marks: on the host, how many tables the perturbation and the update of this step have written, at the places
            PERTURBED and UPDATED; see Backend. UPDATED then counts what the `updated` hook writes. On the CPU it is
            `host`.
        marks_address: of the first mark.
        pending: a write to a vector that has not been counted yet: marks[UPDATED] before it, tensors, new values.
    """

    __slots__ = ("address", "device", "host", "marks", "marks_address", "pending", "values")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: array[float] | None = None
        if device.type == "cpu":
            self.host = array("d", bytes(8 * STATUS_SIZE))
            self.values = torch.frombuffer(self.host, dtype=torch.float64)
        else:
            self.values = torch.zeros(STATUS_SIZE, dtype=status_dtype(device), device=device)
        self.marks = array("d", bytes(8 * STATUS_SIZE)) if self.host is None else self.host
        self.marks_address = self.marks.buffer_info()[0]
        self.pending: tuple[float, list[Tensor], list[Tensor]] | None = None
        self.address = self.values.data_ptr()

    @property
    def sum_of_squares(self) -> Tensor:
        """Sum of squares of the tables seen so far."""
        return self.values[SUM]

    @property
    def ascent_norm(self) -> Tensor:
        """||T_w g||, the global norm of the gradient that perturbs."""
        return self.values[ASCENT_NORM]

    @property
    def inverse_norm(self) -> Tensor:
        """1 / (ascent_norm + eps), 0 where the gradient gives no direction."""
        return self.values[INVERSE_NORM]

    @property
    def skip(self) -> Tensor:
        """Not 0 if a gradient was not finite, so that no parameter and no state may change."""
        return self.values[SKIP]

    @property
    def update_norm(self) -> Tensor:
        """Global norm of the gradient of the update, as it came: of scaled gradients under a GradScaler."""
        return self.values[UPDATE_NORM]

    @property
    def rng_offset(self) -> Tensor:
        """How many primitives have drawn random numbers: a whole number, counted by the engine."""
        return self.values[RNG_OFFSET]

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps in a row were skipped, up to the last one that `finish_norm` has begun."""
        return self.values[SKIPPED_STEPS]


@dataclass(eq=False)
class Table:
    """Tensors of one device with equal dtypes, as columns of equal length. None of them is empty.

    Unless `same_layout` is False, the tensors of a row are dense and have one order in memory, so that a kernel may
    treat them as flat arrays of `params[i].numel()` elements.
    """

    params: list[Tensor]  # what the network computes with
    group_ids: list[int]  # the parameter group of each
    grad_dtype: torch.dtype
    same_layout: bool = True
    # The unperturbed parameters: written by `perturb`, read by updates and `restore`. A parameter that is not perturbed
    # is its own backup. Empty if there are masters.
    backups: list[Tensor] = field(default_factory=list)
    # fp32 copies of bf16 or fp16 parameters: updates write them and round the parameters from them. They are never
    # perturbed, and so are the backup. Empty without master weights.
    masters: list[Tensor] = field(default_factory=list)
    # Optimizer state by name, in the arithmetic's dtype. None in a column: the parameter's group does not use it.
    rule: UpdateRule | None = None
    state: dict[str, list[Tensor | None]] = field(default_factory=dict)
    # What `perturb` multiplies the length of each row's e by: a number per row, of status_dtype; None: 1.
    factors: Tensor | None = None
    # Precond-SAM: Adam's second moments v, in the arithmetic's dtype, and `unbias` = 1 / sqrt(1 - beta2^step) of each
    # row, of status_dtype. They make T_w = (sqrt(v) * unbias + eta)^(-1/2), whether a group is adaptive or not.
    second_moments: list[Tensor] = field(default_factory=list)
    unbias: Tensor | None = None
    # Random numbers: element i of row r draws number i of the stream (seed, rng_offset, rng_streams[r], purpose).
    stochastic_rounding: bool = False  # of bf16 and fp16 parameters; never together with masters
    seed: int = 0  # 64 bits
    rng_streams: list[int] = field(default_factory=list)  # 31 bits each; empty where nothing is drawn
    # Set before a primitive runs and dropped after it, so that gradients can be freed.
    grads: list[Tensor] = field(default_factory=list)
    grad_addresses: array[int] = field(default_factory=lambda: NO_ADDRESSES)  # of 64 bits each
    # New values that an update has computed, as (tensor, value); not empty only while it writes them.
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    native: Any = None  # the backend's own form of this table
    bound_grads: Any = None  # the gradient addresses that `native` has


@dataclass(eq=False)
class VectorPair:
    """Two columns of equal length for `dot`, `axpby` and `ema`. No tensor is empty.

    Row by row the tensors are dense and have one order in memory. A column has one dtype; fp64 columns stand alone. The
    next call may bring other tensors of the same sizes and dtypes.
    """

    x: list[Tensor]
    y: list[Tensor]
    native: Any = None  # the backend's own form for these sizes and dtypes


# ---- the primitives -------------------------------------------------------------------------------------------------


class Backend(ABC):
    """One way to run the primitives.

    A backend that serves only some of them is a subclass of backends.Reference or Foreach and inherits the rest.

    An exception, such as an interrupt, may end a primitive at any moment. `perturb` therefore completes the backups
    before it writes a parameter, and adds 1 to `status.marks[PERTURBED]` in between; a kernel does all three in one
    call. An update adds 1 to `status.marks[UPDATED]` once it is complete; called again before that, it goes on.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def unavailable_reason(cls) -> str | None:
        """Return why this backend cannot run on this machine and what to do about it; None if it can."""

    @abstractmethod
    def supports(self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
        """Return True if the backend has kernels for parameters and gradients of these dtypes on this device."""

    @abstractmethod
    def accumulate_norm(self, table: Table, groups: Sequence[PerturbGroup] | None, status: Status) -> None:
        """Add the sum of squares of T_w g to `status.sum_of_squares`, in fp32 or wider; of g where groups is None."""

    def finish_norm(self, status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
        """Turn the sum of squares into a norm and a skip flag.

        Without keep_skip a step begins. The flag that is there is then the last step's, and counts in SKIPPED_STEPS.

        Args:
            ascent: True writes `ascent_norm` and `inverse_norm`, False `update_norm`.
            keep_skip: True keeps a skip flag that is already set.
            eps: added to the norm before dividing by it.
        """
        finish_norm(status, ascent=ascent, keep_skip=keep_skip, eps=eps)

    def norm(
        self,
        tables: Sequence[Table],
        groups: Sequence[PerturbGroup] | None,
        status: Status,
        *,
        keep_skip: bool,
        eps: float,
    ) -> None:
        """Take the norm over all tables: of T_w g for `perturb`, or of g for the update where groups is None.

        As `accumulate_norm` for each table, from zero, then `finish_norm`; a backend may do both in one launch.
        """
        status.values[SUM] = 0
        for table in tables:
            self.accumulate_norm(table, groups, status)
        self.finish_norm(status, ascent=groups is not None, keep_skip=keep_skip, eps=eps)

    @abstractmethod
    def squares(self, table: Table, groups: Sequence[PerturbGroup], sums: Tensor, *, weights: bool) -> None:
        """Write each row's sum of squares of T_w g to `sums[0]` and, with `weights`, that of the params to `sums[1]`.

        With masters, the params are the masters.

        Args:
            sums: shape (2, rows), of `status_dtype`, on the tensors' device.
        """

    @abstractmethod
    def perturb(self, table: Table, groups: Sequence[PerturbGroup], status: Status) -> None:
        """Copy params to backups; then, unless skip is set, params += rho * inverse_norm * factors[row] * T_w^2 g.

        Where a group's mask_prob is below 1, only elements drawn at random, by rho / mask_prob (arXiv 2110.03141).
        With masters, params = masters + rho * ..., and no backup is written. A table with second moments has no mask.
        """

    @abstractmethod
    def update(
        self, table: Table, groups: Sequence[Any], status: Status, grad_scale: Tensor | None, max_norm: float
    ) -> None:
        """Take one step of `table.rule` from the backups (or masters) into the params.

        Where skip is set the params are restored, bit for bit, and no state changes.

        Args:
            groups: of `table.rule.group`.
            grad_scale: one number on the device by which every gradient is divided first; None: 1.
            max_norm: the gradient is then multiplied by min(1, max_norm / (update_norm / grad_scale + 1e-6)), as
                torch.nn.utils.clip_grad_norm_ does; inf: no clipping.
        """

    @abstractmethod
    def restore(self, table: Table) -> None:
        """Copy backups to params, bit for bit; with masters, round them into the params."""

    @abstractmethod
    def dot(self, pair: VectorPair, sums: Tensor, *, reset: bool) -> None:
        """Add <x, y>, ||x||^2 and ||y||^2 over all rows to `sums[XY]`, `sums[XX]`, `sums[YY]`, in one pass.

        Args:
            sums: of `status_dtype`, on the tensors' device.
            reset: True starts from zero.
        """

    @abstractmethod
    def axpby(
        self,
        pair: VectorPair,
        out: list[Tensor],
        coefficients: Tensor | tuple[float, float],
        status: Status | None = None,
    ) -> None:
        """Write out = a * x + b * y, with a, b = coefficients.

        Args:
            out: `pair.x`, `pair.y`, or a third column of the dtype of either.
            coefficients: two numbers, on the host or on the device in `status_dtype`. A column with coefficient 0
                counts for nothing, even where it is not finite.
            status: if given, nothing is written where skip is set, and `status.marks[UPDATED]` gets 1 more with it.
        """

    @abstractmethod
    def ema(self, pair: VectorPair, decay: float, status: Status | None = None) -> None:
        """Write x = decay * x + (1 - decay) * y; with a status, nothing where skip is set."""


def finish_norm(status: Status, *, ascent: bool, keep_skip: bool, eps: float) -> None:
    """Compute norms and the skip flag from the sum of squares, see Backend.finish_norm."""
    values = status.values
    if not keep_skip:
        count_skipped_step(values)
    norm = values[SUM].sqrt()
    not_finite = ~values[SUM].isfinite()
    if ascent:
        inverse = 1 / (norm + eps)
        usable = (inverse <= 1e30) & ~not_finite  # a gradient of zero gives no direction
        values[ASCENT_NORM] = norm
        values[INVERSE_NORM] = torch.where(usable, inverse, torch.zeros_like(inverse))
    else:
        values[UPDATE_NORM] = norm
    values[SKIP] = (not_finite | (values[SKIP] != 0)) if keep_skip else not_finite


def count_skipped_step(values: Tensor) -> None:
    """Add 1 to a status's skipped steps in a row if the step that ends was skipped, else start again from 0."""
    values[SKIPPED_STEPS] = (values[SKIPPED_STEPS] + 1) * (values[SKIP] != 0)
