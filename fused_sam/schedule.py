"""Which steps perturb: schedules that cut the price of SAM's second pass, for every method of the family.

    optimizer = SAM(params, rho=0.5, lr=0.1, schedule=Every(10))

A step that does not perturb is the base optimizer's and takes one pass: step(closure) calls the closure once, and who
makes the two passes by hand asks `optimizer.perturbs` after the first backward(). A schedule's own memory is in the
parameter groups: a state_dict resumes it. How far a step perturbs is rho.py's subject, whose names stand here too.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .backends.contract import XX
from .engine.calls import Scan
from .engine.options import check_count, check_range
from .engine.plan import Plan
from .engine.vectors import Pair
from .rho import RhoFromRate, RhoSchedule, RhoWarmup

__all__ = [
    "AdaptiveSchedule",
    "AfterDecay",
    "Every",
    "Random",
    "RhoFromRate",
    "RhoSchedule",
    "RhoWarmup",
    "Schedule",
    "Scheduled",
    "Tail",
]


class Scheduled(Protocol):
    """What a schedule sees of the optimizer that asks it."""

    param_groups: list[dict[str, Any]]
    loss_scale: Tensor | float | None  # what the gradients were multiplied by, where the user has said so

    def _scan(self) -> tuple[Plan, Scan]:
        """The gradients of the first pass, and the plan for them."""


class Schedule(ABC):
    """What SAM asks of a schedule. Its memory is kept in the parameter groups, so that a state_dict carries it."""

    needs_gradients: ClassVar[bool] = False  # whether `due` looks at the gradients of the first pass
    needs_scale: ClassVar[bool] = False  # whether it compares them over steps, and so must know a GradScaler's scale

    def memory(self) -> dict[str, Any]:
        """Names and first values of what the schedule remembers; every group gets them, and the first one's count."""
        return {"updates": 0}

    @abstractmethod
    def due(self, optimizer: Scheduled) -> bool:
        """Whether the step that begins now perturbs."""

    def stepped(self, optimizer: Scheduled) -> None:
        """An update has happened, or was skipped."""
        for group in optimizer.param_groups:
            group["updates"] += 1


def _updates(optimizer: Scheduled) -> int:
    return int(optimizer.param_groups[0]["updates"])


class Every(Schedule):
    """Perturb every `interval`-th step (as Composer's `interval`; here the first step is included).

    Raises:
        TypeError, ValueError: the interval is not a whole number of at least 1.
    """

    def __init__(self, interval: int) -> None:
        self.interval = check_count("interval", interval)

    def due(self, optimizer: Scheduled) -> bool:
        return _updates(optimizer) % self.interval == 0


class Tail(Schedule):
    """Perturb in the last part of training: from step `start` on, or from the share `start` of `total` steps on.

    Tail(0.7, total) perturbs the last 30%. SAM finds flat minima late in training: Zhou et al., arXiv 2410.10373.

    Args:
        start: a whole number of steps, or with `total` a share from 0 to 1.
        total: steps of the whole training, at least 1.

    Raises:
        TypeError, ValueError: out of range, or a share without a total.
    """

    start: int

    def __init__(self, start: float, total: int | None = None) -> None:
        if total is None:
            if isinstance(start, float):
                raise ValueError(
                    f"start={start!r} is a share of training: pass the total number of steps, Tail({start!r}, total)"
                )
            self.start = check_count("start", start, 0)
        else:
            steps = check_range("start", start, 0, 1) * check_count("total", total)
            self.start = math.ceil(round(steps, 9))  # 0.07 * 100 is a little above 7

    def due(self, optimizer: Scheduled) -> bool:
        return _updates(optimizer) >= self.start


class AfterDecay(Schedule):
    """Perturb while the learning rate is at most `fraction` of the highest so far: the tail of any LR scheduler.

    The first group's learning rate counts, as a number of the host; looked at whenever a step begins. After a constant
    rate with one drop to a tenth, any fraction from 0.1 to below 1 begins at the drop.

    Args:
        fraction: from 0 to below 1.
    """

    def __init__(self, fraction: float = 0.5) -> None:
        self.fraction = check_range("fraction", fraction, 0, 1)
        if self.fraction == 1:
            raise ValueError("fraction must be below 1: at 1 every step would perturb")

    def memory(self) -> dict[str, Any]:
        return {**super().memory(), "highest_lr": 0.0}

    def due(self, optimizer: Scheduled) -> bool:
        group = optimizer.param_groups[0]
        return group["highest_lr"] > 0 and float(group["lr"]) <= self.fraction * group["highest_lr"]

    def stepped(self, optimizer: Scheduled) -> None:
        super().stepped(optimizer)
        for group in optimizer.param_groups:
            group["highest_lr"] = max(group["highest_lr"], float(group["lr"]))


class Random(Schedule):
    """Perturb each step with a probability (SS-SAM).

    What is drawn is a function of the seed and of the number of the step: the same on all processes and after resuming.

    Args:
        probability: 0 to 1.
        seed: a whole number of at least 0.
    """

    def __init__(self, probability: float = 0.5, seed: int = 0) -> None:
        self.probability = check_range("probability", probability, 0, 1)
        self.seed = check_count("seed", seed, 0)

    def due(self, optimizer: Scheduled) -> bool:
        number = hashlib.blake2b(f"{self.seed} {_updates(optimizer)}".encode(), digest_size=6).digest()
        return int.from_bytes(number, "big") < self.probability * 2**48


class AdaptiveSchedule(Schedule):
    """AE-SAM's rule: perturb where this batch's gradient is large for its time, a sign of a sharp place.

        mu = delta mu + (1 - delta) ||g||^2;  s2 = delta s2 + (1 - delta) (||g||^2 - mu)^2
        perturb if ||g||^2 >= mu + c_t sqrt(s2),  c_t = (t / T) lambda_1 + (1 - t / T) lambda_2

    Jiang et al., "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023, arXiv 2304.14647.
    With LookSAM it is not their AE-LookSAM: LookSAM's own rhythm counts within the steps that this one picks.

    The host decides, and so waits for the device once a step. Under a GradScaler set `optimizer.loss_scale =
    scaler.get_scale()` before each step: gradients of different steps are compared. A gradient that is not finite
    leaves the averages as they are.

    Args:
        total: T, steps of the whole training; afterwards c_t stays lambda_1.
        lambda_1, lambda_2: thresholds at the end and at the beginning, in standard deviations.
        delta: 0 to below 1, the averages' memory; 0.9 in the paper.

    Raises:
        TypeError, ValueError: total is no whole number of at least 1, delta out of range, a threshold is no finite
            number.
        RuntimeError: `perturbs` asked where no parameter has a gradient.
    """

    needs_gradients = True
    needs_scale = True

    def __init__(self, total: int, lambda_1: float = -1.0, lambda_2: float = 1.0, delta: float = 0.9) -> None:
        self.total = check_count("total", total)
        self.lambda_1 = check_range("lambda_1", lambda_1, -1e6, 1e6)
        self.lambda_2 = check_range("lambda_2", lambda_2, -1e6, 1e6)
        self.delta = check_range("delta", delta, 0, 1)
        if self.delta == 1:
            raise ValueError("delta must be below 1: at 1 the averages would never move")

    def memory(self) -> dict[str, Any]:
        # The next averages wait in the groups until the update has happened.
        return {**super().memory(), "square_mean": 0.0, "square_variance": 0.0, "next_squares": None}

    def due(self, optimizer: Scheduled) -> bool:
        group, square = optimizer.param_groups[0], self._square(optimizer)
        if not math.isfinite(square):
            return True  # the step is skipped, as every step with such a gradient
        mean = self.delta * group["square_mean"] + (1 - self.delta) * square
        variance = self.delta * group["square_variance"] + (1 - self.delta) * (square - mean) ** 2
        for each in optimizer.param_groups:
            each["next_squares"] = (mean, variance)
        t = min(1.0, group["updates"] / self.total)
        return square >= mean + (t * self.lambda_1 + (1 - t) * self.lambda_2) * math.sqrt(variance)

    def stepped(self, optimizer: Scheduled) -> None:
        super().stepped(optimizer)
        for group in optimizer.param_groups:
            if group["next_squares"] is not None:
                (group["square_mean"], group["square_variance"]), group["next_squares"] = group["next_squares"], None

    def _square(self, optimizer: Scheduled) -> float:
        """||g||^2 over all parameters, without the loss scale."""
        plan, scan = optimizer._scan()
        if not any(scan.codes):
            raise RuntimeError("AdaptiveSchedule decides by the gradients, and there are none: ask after backward()")
        square = Pair(plan, scan.gradients, scan.gradients).dots()[XX]
        scale = 1.0 if optimizer.loss_scale is None else float(optimizer.loss_scale)
        return float(square) / scale**2
