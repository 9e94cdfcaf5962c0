"""This module turns the command line's values into Settings. A bad value raises a DemoError that names its option.

All checks of options run here, before any training starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_sam import backends

from . import DemoError
from .methods import METHODS, Method
from .presets import PRESETS, Preset

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # the folder of Debian's package dataset-fashion-mnist
FIGURE_TYPES = (".png", ".pdf", ".svg")
MAX_PROCESSES = 1024


@dataclass(frozen=True)
class Settings:
    """Holds the options of one run, checked and with defaults filled in."""

    data: str
    data_dir: Path  # of fashion-mnist
    methods: tuple[Method, ...]
    lrs: tuple[float, ...]
    rhos: tuple[float, ...]
    seeds: int
    epochs: int
    noises: tuple[float, ...]
    batch_size: int
    backend: str
    processes: int
    output: Path
    json: Path | None
    preset: Preset


def read_settings(
    *,
    data: str,
    data_dir: Path | None,
    optimizer: Sequence[str],
    rho: Sequence[str],
    lr: Sequence[str],
    seeds: str | None,
    epochs: str | None,
    noise: Sequence[str],
    batch_size: str | None,
    backend: str,
    processes: str | None,
    output: Path,
    json: Path | None,
) -> Settings:
    """Return the settings of a command line.

    Raises:
        DemoError: an option is bad.
    """
    if data not in PRESETS:
        raise DemoError(f"--data must be one of {', '.join(PRESETS)}, not {data!r}")
    if data_dir is not None and data != "fashion-mnist":
        raise DemoError("--data-dir goes with --data fashion-mnist only")
    preset = PRESETS[data]
    settings = Settings(
        data=data,
        data_dir=data_dir or FASHION_FOLDER,
        methods=_methods(optimizer),
        lrs=tuple(sorted(_numbers("--lr", lr, "more than 0", lambda x: x > 0) or preset.lrs)),
        rhos=_numbers("--rho", rho, "0 or more", lambda x: x >= 0) or preset.rhos,
        seeds=preset.seeds if seeds is None else _whole("--seeds", seeds),
        epochs=preset.epochs if epochs is None else _whole("--epochs", epochs),
        noises=_numbers("--noise", noise, "from 0 to 1", lambda x: 0 <= x <= 1),
        batch_size=preset.batch_size if batch_size is None else _whole("--batch-size", batch_size),
        backend=backend,
        processes=available_cores() if processes is None else _whole("--processes", processes, MAX_PROCESSES),
        output=output,
        json=json,
        preset=preset,
    )
    _check_backend(backend)
    if output.suffix.lower() not in FIGURE_TYPES:
        raise DemoError(f"--output must end in {', '.join(FIGURE_TYPES)}, not {str(output)!r}")
    if json is not None and json.resolve() == output.resolve():
        raise DemoError(f"--output and --json name the same file, {str(output)!r}")
    _check_writable("--output", output)
    if json is not None:
        _check_writable("--json", json)
    return settings


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(values: Sequence[str]) -> list[str]:
    """Return the values of an option that may be repeated, or list values with commas; each value once."""
    return list(dict.fromkeys(word.strip() for value in values for word in value.split(",")))


def _methods(values: Sequence[str]) -> tuple[Method, ...]:
    words = _words(values)
    for word in words:
        if word != "all" and word not in METHODS:
            raise DemoError(f"--optimizer must be one of all, {', '.join(METHODS)}, not {word!r}")
    return tuple(method for name, method in METHODS.items() if name in words or "all" in words)


def _number(option: str, word: str, range_: str, is_valid: Callable[[float], bool]) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_valid(value)):
        raise DemoError(f"{option} must be a number, {range_}, not {word!r}")
    return value


def _numbers(option: str, words: Sequence[str], range_: str, is_valid: Callable[[float], bool]) -> tuple[float, ...]:
    values = (_number(option, word, range_, is_valid) for word in _words(words))
    return tuple(dict.fromkeys(values))


def _whole(option: str, word: str, high: int | None = None) -> int:
    value = int(word) if word.strip().isdecimal() else 0
    if value < 1 or (high is not None and value > high):
        upper = "or more" if high is None else f"to {high}"
        raise DemoError(f"{option} must be a whole number, 1 {upper}, not {word!r}")
    return value


def _check_backend(name: str) -> None:
    try:
        backends.choose(name, torch.device("cpu"))
    except (ValueError, RuntimeError) as error:
        raise DemoError(f"--backend: {error}") from None


def _check_writable(option: str, path: Path) -> None:
    """Check that a file can be written, by opening it.

    Missing permissions, a missing folder, and a full or read-only disk all make that fail.
    """
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise DemoError(f"{option}: cannot write {str(path)!r} ({error.strerror})") from None
    if not existed:
        path.unlink()
