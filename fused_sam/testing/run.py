"""`selftest` runs the checks of every backend that can run on this machine."""

from __future__ import annotations

import time

import torch

from fused_sam import backends

from .checks import checks
from .rate import step_rate
from .report import Report, Result

ORACLE = "reference"


def selftest(backend: str | None = None, *, rates: bool = True) -> Report:
    """Check backends against `reference`: every primitive, dtype and base optimizer, on every device that they serve.

    Args:
        backend: the name of one backend; None: all that can run here. The report names the others with their reasons.
        rates: time a whole step of each backend too.

    Raises:
        ValueError: there is no such backend, or it is `reference` itself.
        RuntimeError: it cannot run here; the message says why.
    """
    start = time.perf_counter()
    names = [name for name in backends.BACKENDS if name != ORACLE] if backend is None else [backend]
    for name in names:
        if name == ORACLE:
            raise ValueError("'reference' is what the other backends are compared with: name another one")
        if name not in backends.BACKENDS:
            known = ", ".join(repr(each) for each in backends.BACKENDS if each != ORACLE)
            raise ValueError(f"unknown backend {name!r}; there are {known}")
    report = Report()
    for name in names:
        cls = backends.BACKENDS[name]
        reason = cls.unavailable_reason()
        served = [] if reason else [d for d in _devices() if cls().supports(d, torch.float32, torch.float32)]
        if not served:
            reason = reason or "it supports no device of this machine"
            if backend is not None:
                raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
            report.untested[name] = reason
        for device in served:
            with torch.random.fork_rng(devices=[]):
                _check(report, name, device)
            if rates:
                report.rates[name, device.type] = step_rate(name, device)
    report.seconds = time.perf_counter() - start
    return report


def _check(report: Report, name: str, device: torch.device) -> None:
    for subject, dtypes, check in checks(backends.BACKENDS[name](), device):
        try:
            message = check()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        report.results.append(Result(name, device.type, subject, dtypes, message))


def _devices() -> list[torch.device]:
    """Return the devices of this machine, one of each type."""
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append(torch.device(kind, module.current_device()))
    return found
