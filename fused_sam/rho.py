"""Schedules of rho set how far each step perturbs. Step them next to a learning-rate scheduler.

    rho = RhoWarmup(optimizer, steps=500)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer

from .engine.options import check_count, check_range


class RhoSchedule(ABC):
    """Sets every group's rho, as torch's learning-rate schedulers set lr.

    Subclass it to write your own schedule of rho. Call step() after each update, and after their step().

    Args:
        optimizer: a fused_sam optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0  # calls of step()
        self._set()

    @abstractmethod
    def rho(self, k: int, group: dict[str, Any]) -> float:
        """Return rho of group k at this step."""

    def step(self) -> None:
        """Set rho of the next step."""
        self.steps += 1
        self._set()

    def _set(self) -> None:
        for k, group in enumerate(self.optimizer.param_groups):
            group["rho"] = self.rho(k, group)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name not in ("optimizer", "_initial_rho")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict and set rho. Call it after the optimizer's load_state_dict()."""
        own = self.state_dict()
        vars(self).update({name: value for name, value in state_dict.items() if name in own})
        self._set()


class RhoWarmup(RhoSchedule):
    """Raises rho linearly over the first `steps` steps, from `start` times its value up to that value.

    Use it to begin training with small perturbations. The group keeps that value as "initial_rho", as torch's
    schedulers keep "initial_lr". A group that is added later has a value of its own.

    Args:
        optimizer: a fused_sam optimizer.
        steps: a whole number of at least 1.
        start: 0 to 1. At 0 the first step does not perturb.

    Raises:
        TypeError, ValueError: steps or start is out of range.
    """

    def __init__(self, optimizer: Optimizer, steps: int, start: float = 0.0) -> None:
        self.duration = check_count("steps", steps)
        self.start = check_range("start", start, 0, 1)
        self._initial_rho: dict[int, float] = {}  # by group, if a checkpoint of another optimizer removed it
        super().__init__(optimizer)

    def rho(self, k: int, group: dict[str, Any]) -> float:
        done = min(1.0, self.steps / self.duration)
        self._initial_rho[k] = group.setdefault("initial_rho", self._initial_rho.get(k, float(group["rho"])))
        return self._initial_rho[k] * (self.start + (1 - self.start) * done)


class RhoProportionalToLR(RhoSchedule):
    """Lets rho follow the learning rate, as GSAM does (arXiv 2203.08065).

        rho_t = rho_min + (rho_max - rho_min) (lr_t - lr_min) / (lr_max - lr_min)

    Each group's own lr_t counts, limited to lr_min and lr_max.

    Args:
        optimizer: a fused_sam optimizer.
        rho_max, rho_min: rho at lr_max and lr_min, 0 or more, with rho_max at least rho_min.
        lr_max, lr_min: the learning rate's highest and lowest value, with lr_max above lr_min.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, rho_max: float, rho_min: float = 0.0, *, lr_max: float, lr_min: float = 0.0
    ) -> None:
        self.rho_max = check_range("rho_max", rho_max, 0, 1e6)
        self.rho_min = check_range("rho_min", rho_min, 0, self.rho_max)
        self.lr_max = check_range("lr_max", lr_max, 0, 1e6, open_low=True)
        self.lr_min = check_range("lr_min", lr_min, 0, self.lr_max)
        if self.lr_min == self.lr_max:
            raise ValueError(f"lr_max must be above lr_min; both are {self.lr_max:g}")
        super().__init__(optimizer)

    def rho(self, k: int, group: dict[str, Any]) -> float:
        fraction = (float(group["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * min(1.0, max(0.0, fraction))
