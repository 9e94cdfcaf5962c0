"""The machine of a run, which is printed above every table and stored in every JSON file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.errors import BenchError


@dataclass(frozen=True)
class Machine:
    """Processor, software and time of a run; `load` is the machine's load average at its start."""

    device: str
    processor: str
    cores: int
    threads: int
    gpu: str | None
    simd: str
    torch: str
    python: str
    system: str
    commit: str
    date: str
    load: float

    @property
    def slug(self) -> str:
        """The name of the folder for this machine's results, such as cpu-2-cores-amd-epyc."""
        name = self.gpu or f"cpu-{self.threads}-cores-{self.processor}"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def title(self) -> str:
        """The machine's short description for tables and plots."""
        return f"{self.gpu or f'{self.processor}, {self.threads} threads'}, torch {self.torch}"

    @property
    def busy(self) -> bool:
        """True if other work used the processor when the run began."""
        return self.load > 0.5


def device_of(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        BenchError: it cannot be timed, or it is not present.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"unknown device {name!r}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError("device cuda: torch finds no GPU here; leave --device out to run on the CPU")
    return device


def describe(device: torch.device) -> Machine:
    return Machine(
        device=device.type,
        processor=processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        simd=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        commit=commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def processor() -> str:
    """Return the processor's name from Linux, or else the best name from Python."""
    listing = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Return the project's commit, with "+" if files differ from it; empty outside a git checkout.

    FUSED_SAM_COMMIT names the commit of a copy without git's folder.
    """
    if named := os.environ.get("FUSED_SAM_COMMIT"):
        return named
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
