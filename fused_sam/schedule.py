"""Schedules decide which steps perturb, for every method of the family. They cut the cost of SAM's second pass.

    optimizer = SAM(params, rho=0.5, lr=0.1, schedule=Every(10))

A step that does not perturb is the base optimizer's and takes one pass. step(closure) then calls the closure once.
A loop that makes both passes by hand reads `optimizer.needs_second_pass` after the first backward(). A schedule keeps
its state in the parameter groups, so that a state_dict resumes it. Schedules of rho are in rho.py.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from .engine.options import check_count, check_range
from .rho import RhoProportionalToLR, RhoSchedule, RhoWarmup
from .step import Schedule, Step

__all__ = [
    "AdaptiveSchedule",
    "AfterDecay",
    "Every",
    "LastSteps",
    "Random",
    "RhoProportionalToLR",
    "RhoSchedule",
    "RhoWarmup",
    "Schedule",
]


def _step_number(step: Step) -> int:
    return int(step.groups[0]["sam_step"])


class Every(Schedule):
    """Perturbs every `interval`-th step, as Composer's `interval` does, but beginning with the first step.

    Args:
        interval: a whole number of at least 1.

    Raises:
        TypeError, ValueError: the interval is out of range.
    """

    def __init__(self, interval: int) -> None:
        self.interval = check_count("interval", interval)

    def due(self, step: Step) -> bool:
        return _step_number(step) % self.interval == 0


class LastSteps(Schedule):
    """Perturbs in the last part of training, from step `start` on.

    LastSteps(0.7, total) perturbs the last 30%. SAM finds flat minima late in training: Zhou et al., arXiv 2410.10373.

    Args:
        start: a whole number of steps; with `total`, a fraction of `total` from 0 to 1.
        total: steps of the whole training, at least 1.

    Raises:
        TypeError, ValueError: an argument is out of range, or start is a fraction without a total.
    """

    start: int

    def __init__(self, start: float, total: int | None = None) -> None:
        if total is None:
            if isinstance(start, float):
                raise ValueError(
                    f"start={start!r} is a fraction of training: "
                    f"pass the total number of steps, LastSteps({start!r}, total)"
                )
            self.start = check_count("start", start, 0)
        else:
            steps = check_range("start", start, 0, 1) * check_count("total", total)
            self.start = math.ceil(round(steps, 9))  # 0.07 * 100 is a little above 7

    def due(self, step: Step) -> bool:
        return _step_number(step) >= self.start


class AfterDecay(Schedule):
    """Perturbs while the learning rate is at most `fraction` of the highest so far, under any LR scheduler.

    The first group's learning rate counts, as a number on the host. Each step reads it when it begins. If a constant
    rate drops once to a tenth, any fraction from 0.1 to below 1 begins at the drop.

    Args:
        fraction: from 0 to below 1.

    Raises:
        TypeError, ValueError: the fraction is out of range.
    """

    def __init__(self, fraction: float = 0.5) -> None:
        self.fraction = check_range("fraction", fraction, 0, 1)
        if self.fraction == 1:
            raise ValueError("fraction must be below 1: at 1 every step would perturb")

    def group_state(self) -> dict[str, Any]:
        return {**super().group_state(), "highest_lr": 0.0}

    def due(self, step: Step) -> bool:
        group = step.groups[0]
        return group["highest_lr"] > 0 and float(group["lr"]) <= self.fraction * group["highest_lr"]

    def stepped(self, step: Step) -> None:
        super().stepped(step)
        for group in step.groups:
            group["highest_lr"] = max(group["highest_lr"], float(group["lr"]))


class Random(Schedule):
    """Perturbs each step with a probability (SS-SAM).

    The choice is a function of the seed and of the step's number. It is the same on all processes and after resuming.

    Args:
        probability: 0 to 1.
        seed: a whole number of at least 0.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(self, probability: float = 0.5, seed: int = 0) -> None:
        self.probability = check_range("probability", probability, 0, 1)
        self.seed = check_count("seed", seed, 0)

    def due(self, step: Step) -> bool:
        number = hashlib.blake2b(f"{self.seed} {_step_number(step)}".encode(), digest_size=6).digest()
        return int.from_bytes(number, "big") < self.probability * 2**48


class AdaptiveSchedule(Schedule):
    """Perturbs if this batch's gradient is large for this stage of training, which indicates sharpness (AE-SAM).

        mu = delta mu + (1 - delta) ||g||^2;  s2 = delta s2 + (1 - delta) (||g||^2 - mu)^2
        perturb if ||g||^2 >= mu + c_t sqrt(s2),  c_t = (t / T) lambda_1 + (1 - t / T) lambda_2

    Jiang et al., "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023, arXiv 2304.14647.
    With LookSAM this differs from their AE-LookSAM, because LookSAM's k counts only the steps that this schedule picks.

    The host decides, and so waits for the device once per step. Under a GradScaler, set `optimizer.ascent_grad_scale =
    scaler.get_scale()` before each step, because gradients of different steps are compared. A gradient that is not
    finite leaves the averages as they are.

    Args:
        total: T, steps of the whole training, a whole number of at least 1; afterwards c_t stays lambda_1.
        lambda_1, lambda_2: thresholds at the end and at the beginning, in standard deviations.
        delta: decay of the averages, 0 to below 1; 0.9 in the paper.

    Raises:
        TypeError, ValueError: total or delta is out of range, or a threshold is not a finite number.
        RuntimeError: `needs_second_pass` is read while no parameter has a gradient.
    """

    needs_gradients = True
    needs_grad_scale = True

    def __init__(self, total: int, lambda_1: float = -1.0, lambda_2: float = 1.0, delta: float = 0.9) -> None:
        self.total = check_count("total", total)
        self.lambda_1 = check_range("lambda_1", lambda_1, -1e6, 1e6)
        self.lambda_2 = check_range("lambda_2", lambda_2, -1e6, 1e6)
        self.delta = check_range("delta", delta, 0, 1)
        if self.delta == 1:
            raise ValueError("delta must be below 1: at 1 the averages would never move")

    def group_state(self) -> dict[str, Any]:
        # "next_squares" holds the next averages until the update has happened.
        return {**super().group_state(), "square_mean": 0.0, "square_variance": 0.0, "next_squares": None}

    def due(self, step: Step) -> bool:
        group, square = step.groups[0], self._square(step)
        if not math.isfinite(square):
            return True  # every step with such a gradient is skipped
        mean = self.delta * group["square_mean"] + (1 - self.delta) * square
        variance = self.delta * group["square_variance"] + (1 - self.delta) * (square - mean) ** 2
        for each in step.groups:
            each["next_squares"] = (mean, variance)
        t = min(1.0, group["sam_step"] / self.total)
        return square >= mean + (t * self.lambda_1 + (1 - t) * self.lambda_2) * math.sqrt(variance)

    def stepped(self, step: Step) -> None:
        super().stepped(step)
        for group in step.groups:
            if group["next_squares"] is not None:
                (group["square_mean"], group["square_variance"]), group["next_squares"] = group["next_squares"], None

    def _square(self, step: Step) -> float:
        """Return ||g||^2 over all parameters, without the loss scale."""
        if step.grad.empty:
            raise RuntimeError("AdaptiveSchedule decides by the gradients, and there are none: ask after backward()")
        return float(step.grad.dot(step.grad))
