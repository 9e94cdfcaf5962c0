"""These checks look for mistakes in a training loop: at its first steps, and now and then after them.

A step only compares a counter and asks whether a check is still there. What only the device knows is counted there
(`Status.skipped_steps`), and read every so many steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import SKIP, SKIPPED_STEPS

from .calls import GradSnapshot
from .grad_scaler import scaling
from .stale_grads import BackwardWatch
from .user_warnings import (
    GradScaleWarning,
    LargeRhoWarning,
    NoGradientWarning,
    SecondBackwardWarning,
    SkippedStepsWarning,
    warn,
)

FIRST_LOOK = 3  # updates before the first look
LOOK_EVERY = {"cpu": 8}  # updates from one look to the next, where reading the status costs nothing ...
LOOK_EVERY_ELSE = 64  # ... and where the host waits for the device

# GradScaler halves its scale at each skipped step: from its first scale of 2^16, 16 such steps lead to a scale of 1.
SKIPPED_IN_A_ROW = 20

SCALED_STEPS = 3  # so many first steps with a wrong scale are a mistake, and one is chance
SCALE_TOLERANCE = 8.0  # the two gradients of a step differ too

LOSSES = 100  # perturbing steps whose losses are compared
FAR_ABOVE = 0.5  # (perturbed loss - loss) / |loss|, see LossCheck
FALLEN = 0.9  # a loss below this share of its first values has fallen


def look(stepper: Any) -> int:
    """Look at what the last updates have left, and warn; return the number of the update to look after next."""
    status, updates = stepper.status, stepper.updates
    if capturing(status.device):
        return updates + 1
    if updates == FIRST_LOOK and not has_had_gradients(stepper):
        warn(
            f"no parameter of the optimizer has had a gradient in the first {FIRST_LOOK} steps: nothing is trained. "
            "Call loss.backward() before each step, in a closure too, and build the optimizer over the parameters of "
            "the model that computes the loss",
            NoGradientWarning,
        )
    next_look = updates + LOOK_EVERY.get(status.device.type, LOOK_EVERY_ELSE)
    if stepper.warned_of_skipped_steps:
        return next_look
    numbers = status.values.tolist()
    in_a_row = numbers[SKIPPED_STEPS] + 1 if numbers[SKIP] else 0
    if in_a_row >= SKIPPED_IN_A_ROW:
        stepper.warned_of_skipped_steps = True
        warn(
            f"the last {in_a_row:.0f} steps were skipped, because their gradients were not finite (an inf or a NaN): "
            "nothing is trained. Look for the first NaN in inputs, loss and weights, and try a smaller lr and rho. "
            "With a GradScaler call scaler.update() after every step",
            SkippedStepsWarning,
        )
    return next_look


def has_had_gradients(stepper: Any) -> bool:
    """Return True if a parameter has had a gradient; of sharded ones, if one has a gradient now."""
    if stepper.plan.sharding is not None:
        return any(p.grad is not None for p in stepper.plan.params)
    return bool(stepper.had_gradients)


def capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is captured, where nothing can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class PassCheck:
    """Checks that the first perturbing steps have two backward passes, and gradients of the scale that is divided out.

    Attributes:
        done: True if there is nothing left to check.
    """

    def __init__(self, stepper: Any) -> None:
        self._stepper = stepper
        self.done = False
        self._watch: BackwardWatch | None = None
        self._watched = False  # True once the second backward pass was seen, or cannot be
        self._suspect = False  # True after a step in which it was not seen ...
        self._empty = 0  # ... and how many steps had no gradients at all then
        self._had_gradients = False  # True if the first pass of this step has made some
        self._steps = 0
        self._wrong = {"long": 0, "short": 0}  # steps in a row whose update is too long or too short
        self._first_norm: Tensor | None = None  # of this step's first gradients, as they came
        self._scalings = scaling.calls  # losses that were scaled before this step

    def first_pass(self, snapshot: GradSnapshot) -> None:
        """Note the first gradients of a step."""
        self._had_gradients = any(snapshot.codes)
        reads = scaling.calls and not capturing(self._stepper.status.device)
        self._first_norm = norm_of(snapshot) if reads else None
        if self._watched:
            return
        if self._watch is None:
            self._watch = BackwardWatch(self._stepper.plan.params, every=True)
        elif self._suspect and not self._empty and not self._watch.ran:
            self._watched = True  # something else than backward() makes the gradients
        self._watch.ran = False

    def second_pass(self, snapshot: GradSnapshot, scale: Tensor | None, divisor: int) -> None:
        """Compare the gradients of the update with the first ones.

        Args:
            scale: GradScaler's, by which the update divides the gradients; None: by nothing.
            divisor: number of micro-batches that they are the sum of.
        """
        self._steps += 1
        if self._watch is None and not self._watched:  # displaced between the steps, by a method of one pass
            self.done = True
            return
        if not self._watched:
            self._check_backward(snapshot)
        if self._first_norm is not None:
            self._check_scale(snapshot, scale is not None, divisor)
        self._first_norm, self._scalings = None, scaling.calls
        self.done = self._watched and self._steps >= SCALED_STEPS and not any(self._wrong.values())
        if self._watched:
            self._watch = None

    def _check_backward(self, snapshot: GradSnapshot) -> None:
        assert self._watch is not None
        name = self._stepper.base.cls.__name__
        if self._watch.ran or not self._had_gradients:
            self._watched = self._watch.ran
        elif not any(snapshot.codes):
            self._empty += 1
            if self._empty == 1:  # a way to undo the perturbation
                return
            self._watched = True
            warn(
                "no parameter has a gradient in the second half of the step, after first_step(): the weights were "
                "restored and not updated. Compute the loss again and call backward() before second_step()",
                SecondBackwardWarning,
            )
        elif self._suspect:
            self._watched = True
            warn(
                "no backward pass ran between first_step() and second_step(): the update uses the first gradients once "
                f"more, so that this loop trains by plain {name} steps. Compute the loss again and call backward() "
                "before second_step(), with first_step(zero_grad=True)",
                SecondBackwardWarning,
            )
        self._suspect = not self._watched

    def _check_scale(self, snapshot: GradSnapshot, divided: bool, divisor: int) -> None:
        """Compare the norms of both gradients, as they came, with GradScaler's scale."""
        stepper, scale = self._stepper, scaling.scale()
        if scale is None or scale < SCALE_TOLERANCE**2 or self._first_norm is None:
            return
        first, second = float(self._first_norm), float(norm_of(snapshot)) / divisor
        if not (math.isfinite(first) and math.isfinite(second) and first > 0):
            return
        ratio = second / first

        def about(x: float, y: float) -> bool:
            return y / SCALE_TOLERANCE < x < y * SCALE_TOLERANCE

        short = divided and about(ratio, 1 / scale)
        long = not divided and about(ratio, scale)
        if not divided and about(ratio, 1) and not stepper.grads_unscaled and scaling.calls > self._scalings:
            long = second > scale / (2 * SCALE_TOLERANCE)  # neither gradient was unscaled; few networks have such norms
        self._wrong = {"long": (self._wrong["long"] + 1) * long, "short": (self._wrong["short"] + 1) * short}
        if self._wrong["long"] == SCALED_STEPS:
            self._warn_of_scale(
                f"the gradients of the update have GradScaler's scale of {scale:g}, and nothing divides them by it: "
                "the update is too long by that factor. Step by scaler.step(optimizer) instead of second_step(), or "
                "call scaler.unscale_(optimizer) after the second backward()"
            )
        elif self._wrong["short"] == SCALED_STEPS:
            self._warn_of_scale(
                f"scaler.step(optimizer) divides the gradients of the update by GradScaler's scale of {scale:g}, which "
                "they do not have: the update is too short by that factor. Call backward() on scaler.scale(loss) in "
                "the second pass as in the first"
            )

    def _warn_of_scale(self, text: str) -> None:
        self._wrong = dict.fromkeys(self._wrong, 0)
        warn(text, GradScaleWarning)


def norm_of(snapshot: GradSnapshot) -> Tensor:
    """Return the norm of this process's gradients, without waiting for the device."""
    present = [g for g in snapshot.present() if g.numel()]
    wide = (torch.float32, torch.float64)  # other dtypes are summed in fp32, without a copy
    norms = [torch.linalg.vector_norm(g, dtype=None if g.dtype in wide else wide[0]).float() for g in present]
    return torch.stack(norms).norm() if norms else torch.zeros(())


class LossCheck:
    """Compares the losses of the first steps, where the loop gives them: in step(closure) and sam_step().

    A rho that a trained network bears can hold a fresh one where it started. The perturbed loss then stays far above
    the loss, and the loss does not fall.
    """

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def note(self, loss: Any, perturbed_loss: Any) -> bool:
        """Note a perturbing step's losses; return True if the check is over."""
        try:
            both = (torch.as_tensor(x).detach().float().reshape(()) for x in (loss, perturbed_loss))
            self._pairs.append(torch.stack(list(both)))
        except (TypeError, ValueError, RuntimeError):  # a closure may return anything
            return True
        if len(self._pairs) < LOSSES:
            return False
        if capturing(self._pairs[-1].device):
            return False
        losses, perturbed = torch.stack(self._pairs[-LOSSES:]).double().cpu().unbind(1)
        self._pairs.clear()
        warn_if_rho_is_large(losses, perturbed)
        return True


def warn_if_rho_is_large(losses: Tensor, perturbed: Tensor) -> None:
    """Warn if the loss has not fallen in the last half, and the perturbed loss was mostly far above it."""
    half = LOSSES // 2
    start, end = float(losses[:10].mean()), float(losses[half:].mean())
    rise = float(((perturbed - losses) / losses.abs())[half:].median())
    if start > 0 and end > FALLEN * start and rise > FAR_ABOVE:
        warn(
            f"in the first {LOSSES} steps the loss went from {start:.3g} to {end:.3g}, and the perturbed loss stayed "
            f"{rise:.0%} above it: rho is too large for this network as it is now. Pass a smaller rho, or let it grow "
            "by fused_sam.schedule.RhoWarmup",
            LargeRhoWarning,
        )
