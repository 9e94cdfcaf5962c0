"""The backends by name: which are available, which one is chosen, and why.

The choice is made by `SAM(..., backend=name)`, else by the environment variable FUSED_SAM_BACKEND, else by "auto".
`register` adds a backend of your own.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TypeVar

import torch

from .contract import Backend
from .cpu import Cpu
from .cuda import Cuda
from .foreach import Foreach
from .reference import Reference
from .triton import Triton

__all__ = ["Backend", "Foreach", "Reference", "available", "choose", "preference", "register"]

BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (Reference, Foreach, Cpu, Cuda, Triton)}

# What "auto" tries, best first, per device type; other device types take foreach.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "foreach"),
    "cuda": ("cuda", "triton", "foreach"),
    "xpu": ("triton", "foreach"),
}

_B = TypeVar("_B", bound=type[Backend])


def register(cls: _B) -> _B:
    """Make a backend known under its name, for `SAM(..., backend=name)` and FUSED_SAM_BACKEND; usable as a decorator.

    A backend that serves only some primitives is a subclass of Reference or Foreach and inherits the others.

    Raises:
        TypeError: it is no subclass of Backend, has no name, or lacks a primitive.
        ValueError: the name is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise TypeError(f"register() takes a subclass of fused_sam.backends.Backend, not {cls!r}")
    if inspect.isabstract(cls):
        lacking = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(
            f"backend {cls.__name__} lacks {lacking}: define them, or derive it from fused_sam.backends.Reference or "
            "Foreach, which have every primitive"
        )
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not name or name == "auto":
        raise TypeError(f"backend {cls.__name__} needs a name of its own: name = \"...\" in the class")
    if BACKENDS.get(name, cls) is not cls:
        raise ValueError(f"a backend named {name!r} is registered already: choose another name for {cls.__name__}")
    BACKENDS[name] = cls
    return cls


def available() -> Mapping[str, bool | str]:
    """Return each backend's name with True, or with the reason why it cannot run here."""
    return {name: backend.unavailable_reason() or True for name, backend in BACKENDS.items()}


def preference(device: torch.device) -> tuple[str, ...]:
    """Return the names that "auto" tries for a device, best first."""
    return PREFERENCE.get(device.type, ("foreach",))


def choose(name: str, device: torch.device) -> Backend:
    """Return the backend of that name for parameters on `device`; "auto" is the fastest that can run there.

    Raises:
        ValueError: there is no backend of that name, or it has no kernels for such a device.
        RuntimeError: it cannot run on this machine; the message says why and what to do.
    """
    if name == "auto":
        name = os.environ.get("FUSED_SAM_BACKEND") or "auto"
    if name == "auto":
        usable = (BACKENDS[n] for n in preference(device))
        return next(
            backend()
            for backend in usable
            if backend.unavailable_reason() is None and backend().supports(device, torch.float32, torch.float32)
        )
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are 'auto', " + ", ".join(map(repr, BACKENDS)))
    reason = BACKENDS[name].unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    backend = BACKENDS[name]()
    if not backend.supports(device, torch.float32, torch.float32):
        raise ValueError(f"backend {name!r} does not support {device.type} tensors; use backend='auto'")
    return backend
