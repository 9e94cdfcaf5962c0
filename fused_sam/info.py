"""`python -m fused_sam info` prints the machine, the backends, and which one is used and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import backends
from .backends import cuda

try:
    __version__ = version("fused_sam")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"


def report() -> str:
    """Return the text that `python -m fused_sam info` prints."""
    lines = [
        f"fused_sam {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads())",
        "",
        "backends:",
    ]
    for name, state in backends.available().items():
        lines.append(f"  {name:<10} {'available' if state is True else 'not available: ' + str(state)}")
    if backends.available()["cpu"] is True:
        from . import _cpu  # type: ignore[attr-defined]

        lines.append(f"  (cpu runs its {_cpu.instruction_set()} kernels; can run {', '.join(_cpu.instruction_sets())})")
    if cuda.Cuda.module is not None:
        built, driver = cuda.Cuda.module.runtime_version(), cuda.Cuda.module.driver_version()
        supported = f"the driver supports {_version(driver)}" if driver else "there is no NVIDIA driver"
        lines.append(f"  (cuda was built with CUDA {_version(built)}; {supported})")
    lines += ["", "used by backend='auto':"]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        lines.append(f"  {device!s:<10} {_choice(device)}")
        if device.type == "cuda":
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            lines.append(f"  {'':<10} {torch.cuda.get_device_name(device)}, compute capability {capability}")
            if cuda.Cuda.unavailable_reason() is None and (reason := cuda.why_not(device)):
                lines.append(f"  {'':<10} {reason}")
    return "\n".join(lines)


def _version(number: int) -> str:
    """Return the version that CUDA writes as a number, such as 13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _choice(device: torch.device) -> str:
    """Return the backend that "auto" uses on the device, and why."""
    requested = os.environ.get("FUSED_SAM_BACKEND")
    if requested and requested != "auto":
        try:
            return f"{backends.choose('auto', device).name} (FUSED_SAM_BACKEND={requested})"
        except (RuntimeError, ValueError) as error:
            return f"none: FUSED_SAM_BACKEND={requested}: {error}"
    order = backends.preference(device)
    used = backends.choose("auto", device).name
    unavailable = order[: order.index(used)]
    reason = "first choice" if not unavailable else f"{', '.join(unavailable)} not available"
    return f"{used} ({reason}; order: {', '.join(order)})"
