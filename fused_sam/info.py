"""What `python -m fused_sam info` says: the machine, the backends, the choice and its reason."""

from __future__ import annotations

import os
import platform

import torch

from . import __version__, backends


def report() -> str:
    lines = [
        f"fused_sam {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads())",
        "",
        "backends:",
    ]
    for name, state in backends.available().items():
        lines.append(f"  {name:<10} {'available' if state is True else 'not available: ' + str(state)}")
    if backends.available()["cpu"] is True:
        from fused_sam import _cpu  # type: ignore[attr-defined]

        lines.append(f"  (cpu runs its {_cpu.instruction_set()} kernels; can run {', '.join(_cpu.instruction_sets())})")
    lines += ["", "taken by backend='auto':"]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        lines.append(f"  {device!s:<10} {_choice(device)}")
    return "\n".join(lines)


def _choice(device: torch.device) -> str:
    wanted = os.environ.get("FUSED_SAM_BACKEND")
    if wanted and wanted != "auto":
        try:
            return f"{backends.choose('auto', device).name} (FUSED_SAM_BACKEND={wanted})"
        except (RuntimeError, ValueError) as error:
            return f"none: FUSED_SAM_BACKEND={wanted}: {error}"
    order = backends.preference(device)
    taken = backends.choose("auto", device).name
    passed_over = order[: order.index(taken)]
    reason = "first choice" if not passed_over else f"{', '.join(passed_over)} not available"
    return f"{taken} ({reason}; order: {', '.join(order)})"
