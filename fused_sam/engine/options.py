"""Checks of SAM's own options, in the words of who gave them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def is_number(x: Any) -> bool:
    return x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, Real) and not isinstance(x, bool)


def check_options(group: dict[str, Any], k: int) -> None:
    """Raise ValueError or TypeError for SAM's options of group k that are out of range."""
    for name in ("rho", "eta"):
        value = group[name]
        if not is_number(value):
            raise TypeError(f"{name} of group {k} must be a number, not {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} of group {k} must be a finite number of 0 or more, not {value!r}")
    for name in ("adaptive", "perturb"):
        if isinstance(group[name], str) or group[name] not in (False, True):
            raise TypeError(f"{name} of group {k} must be True or False, not {group[name]!r}")


def check_range(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """value as a float, if it is a number from low to high (or above low)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        bounds = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")
    return float(value)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """value, if it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return value
