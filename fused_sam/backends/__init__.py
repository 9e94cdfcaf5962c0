"""The backends by name: which are there, which one is taken, and why.

The choice is made by `SAM(..., backend=name)`, else by the environment variable FUSED_SAM_BACKEND, else by "auto".
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from .contract import Backend
from .cpu import Cpu
from .cuda import Cuda
from .foreach import Foreach
from .reference import Reference
from .triton import Triton

BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (Reference, Foreach, Cpu, Cuda, Triton)}

# What "auto" tries, best first, for a device type; other device types take foreach.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "foreach"),
    "cuda": ("cuda", "triton", "foreach"),
    "xpu": ("triton", "foreach"),
}


def available() -> Mapping[str, bool | str]:
    """Each backend's name with True, or with the reason why it cannot run here."""
    return {name: backend.missing() or True for name, backend in BACKENDS.items()}


def preference(device: torch.device) -> tuple[str, ...]:
    return PREFERENCE.get(device.type, ("foreach",))


def choose(name: str, device: torch.device) -> Backend:
    """The backend called `name` for weights on `device`; "auto" is the fastest that can run there.

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
            if backend.missing() is None and backend().serves(device, torch.float32, torch.float32)
        )
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are 'auto', " + ", ".join(map(repr, BACKENDS)))
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    backend = BACKENDS[name]()
    if not backend.serves(device, torch.float32, torch.float32):
        raise ValueError(f"backend {name!r} does not serve {device.type} tensors; use backend='auto'")
    return backend
