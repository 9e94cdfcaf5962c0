"""Both passes use the same dropout masks if torch's random generators start from the same states.

    rng = ReplayedRNG()
    loss_fn(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with rng:
        loss_fn(model(x), y).backward()
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class ReplayedRNG:
    """Saves the states of torch's random generators; `with` runs its body from them and restores the generators.

    Use it for equal dropout masks in both passes: make it before the first pass and enter it for the second.

    After the body the generators are in the states that they had before it, however many numbers the body drew. The
    next step thus draws the numbers that it would have drawn without a second pass. The context may be entered many
    times, but not while its body runs.

    Args:
        devices: devices with generators to replay, besides the CPU. None: all CUDA devices, if CUDA is in use.

    Generators of Python, of NumPy and your own are not replayed. Nothing is replayed within a CUDA graph's capture.

    Raises:
        RuntimeError: the context is entered while its body runs.
    """

    def __init__(self, devices: Iterable[torch.device | str] | None = None) -> None:
        if devices is None:
            count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
            devices = [torch.device("cuda", k) for k in range(count)]
        self._devices = sorted({str(d) for d in devices if torch.device(d).type != "cpu"})
        self._start = self._states()
        self._before: list[Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> ReplayedRNG:
        """Save the CPU's generator and those of the devices that hold the model's parameters."""
        return cls({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})

    def __enter__(self) -> ReplayedRNG:
        if self._before is not None:
            raise RuntimeError("ReplayedRNG was entered within itself: leave the first `with` before the next")
        self._before = self._states()
        self._set(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._before is not None
        self._set(self._before)
        self._before = None

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state()] + [torch.get_device_module(d).get_rng_state(d) for d in self._devices]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for d, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(d).set_rng_state(state, d)
