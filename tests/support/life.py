"""One training run of tests/test_random_programs.py: an optimizer, its weights, and the operations on them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ExponentialLR

from fused_sam import ESAM
from fused_sam.methods.displaced import DisplacedSAM

from .bits import assert_same_bits
from .draws import LAYOUTS, values
from .plain import PlainSAM

Group = tuple[list[tuple[tuple[int, ...], str]], dict[str, Any]]

# The first groups of every run, as shapes and layouts of the weights and their options. One weight is frozen.
GROUPS: list[Group] = [
    ([((7, 5), "contiguous"), ((5,), "contiguous"), ((4, 3, 2, 2), "channels_last"), ((0,), "contiguous")], {}),
    ([((), "contiguous"), ((33,), "contiguous"), ((6,), "contiguous")], {"adaptive": True, "eta": 0.1, "rho": 0.3}),
    ([((3, 4), "gaps"), ((9,), "contiguous")], {"perturb": False, "weight_decay": 0.1}),
]
FROZEN = 6
ADDED: list[Group] = [
    ([((2, 3), "transposed"), ((0, 2), "contiguous")], {"rho": 0.2}),
    ([((17,), "contiguous")], {"perturb": False}),
]


class OnPurposeError(Exception):
    """The error that a random program's closure raises."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return x in the layout, or x itself if its shape does not allow the layout."""
    fits = {"channels_last": x.dim() == 4, "transposed": x.dim() >= 2, "gaps": x.dim() >= 1}
    return LAYOUTS[layout](x) if fits.get(layout) else x


class TrainingRun:
    """An optimizer with its weights, a scheduler and a scaler.

    Args:
        make: a function that builds the optimizer from parameter groups.
        dtype: the dtype of the weights.
        numbers: a dtype that holds every weight and gradient of the program; None is the dtype of the weights.
    """

    def __init__(self, make: Callable[[Any], Any], dtype: torch.dtype, numbers: torch.dtype | None = None) -> None:
        self.dtype, self.numbers = dtype, numbers or dtype
        self.params: list[nn.Parameter] = []
        self.optimizer = make([self._group(shapes, options) for shapes, options in GROUPS])
        self.params[FROZEN].requires_grad_(False)
        self.plain = isinstance(self.optimizer, PlainSAM)
        self.scheduler = ExponentialLR(self.optimizer.base if self.plain else self.optimizer, 0.9)
        self.scaler = GradScaler("cpu", init_scale=2.0**6)
        self.saved: dict[int, Tensor] = {}  # copies of the clean weights, by number, while they are perturbed
        self.remember_addresses()

    def _group(self, shapes: Sequence[tuple[tuple[int, ...], str]], options: dict[str, Any]) -> dict[str, Any]:
        at = len(self.params)
        for i, (shape, layout) in enumerate(shapes):
            self.params.append(nn.Parameter(LAYOUTS[layout](self._values(shape, at + i))))
        return {**options, "params": self.params[at:]}

    def _values(self, shape: Sequence[int], seed: int) -> Tensor:
        return values(shape, seed, self.numbers).to(self.dtype)

    # ---- gradients ------------------------------------------------------------------------------------------

    def backward(self, seed: int, missing: frozenset[int] = frozenset(), factor: float = 1.0) -> None:
        """Run a backward pass with gradients drawn from `seed`, for all weights except frozen and `missing` ones."""
        terms = [
            (p * self._values(p.shape, seed + i)).sum()
            for i, p in enumerate(self.params)
            if p.requires_grad and i not in missing
        ]
        if terms:
            (torch.stack(terms).sum() * factor).backward()
        if self.numbers is not self.dtype:
            for p in self.params:
                if p.grad is not None:
                    p.grad.copy_(p.grad.to(self.numbers))

    def make_non_finite(self, i: int, bad: float) -> None:
        """Write an inf or a NaN to the gradient of weight i, if it has one."""
        g = self.params[i].grad
        if g is not None and g.numel():
            g[(0,) * g.dim()] = bad

    def change_grad_layout(self, layout: str) -> None:
        """Copy the gradients to new memory, and to another layout if their shape allows it."""
        for p in self.params:
            if p.grad is not None:
                p.grad = laid_out(p.grad.clone(), layout)

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    # ---- weights and options ----------------------------------------------------------------------------------

    def move_weights(self, layout: str) -> None:
        """Copy the weights to new memory, and to another layout if their shape allows it."""
        for p in self.params:
            p.data = laid_out(p.data.clone(), layout)
        self.remember_addresses()

    def write_weight(self, i: int, seed: int) -> None:
        with torch.no_grad():
            self.params[i].copy_(self._values(self.params[i].shape, seed))

    def add_group(self, k: int) -> None:
        self.optimizer.add_param_group(self._group(*ADDED[k]))
        self.remember_addresses()

    def remember_addresses(self) -> None:
        self.addresses = [p.data_ptr() for p in self.params]

    def step_scheduler(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a program may step the scheduler before the optimizer
            self.scheduler.step()

    # ---- the optimizer ------------------------------------------------------------------------------------------

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Return a context in which the optimizer may be saved, loaded and copied."""
        displaced = isinstance(self.optimizer, DisplacedSAM)
        if displaced:
            self.optimizer.eval()
        yield
        if displaced:
            self.optimizer.train()

    def continue_as_copy(self, way: str) -> None:
        """Replace the weights, optimizer, scheduler and scaler by copies."""
        whole: Any = (self.params, self.optimizer, self.scheduler, self.scaler)
        whole = copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
        self.params, self.optimizer, self.scheduler, self.scaler = whole
        self.remember_addresses()

    def reorder_groups(self, j: int, k: int) -> None:
        """Move the last weight of group j to group k, and exchange the first two groups."""
        groups = self.optimizer.param_groups
        if j != k and len(groups[j]["params"]) > 1:
            groups[k]["params"].append(groups[j]["params"].pop())
        groups[0], groups[1] = groups[1], groups[0]

    def save_clean(self) -> None:
        """Copy the weights that first_step() is about to perturb."""
        options = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        chosen = self.optimizer.choose() if isinstance(self.optimizer, ESAM) else None  # None: every weight
        self.saved = {
            i: p.detach().clone()
            for i, p in enumerate(self.params)
            if p.grad is not None and options[id(p)]["perturb"] and self.optimizer.needs_second_pass
            and (chosen is None or id(p) in chosen)
        }

    def assert_clean(self) -> None:
        """Check that the perturbed weights are restored, bit for bit."""
        assert_same_bits([self.params[i] for i in self.saved], self.saved.values())
