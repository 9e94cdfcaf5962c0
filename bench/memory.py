"""The memory of a step: what it keeps beyond weights, gradients and momentum, and its temporaries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from bench.clock import quiet
from bench.errors import BenchError
from bench.hyper import Hyper
from bench.peers import PEERS
from bench.shapes import by_name
from bench.work import example


@dataclass(frozen=True)
class Usage:
    """Bytes of a step. `weights` is the size of one copy of the weights, `smallest_tensor` that of the smallest one."""

    peer: str
    shape: str
    weights: int
    smallest_tensor: int
    kept: int  # live after a settled step beyond weights, gradients and momentum
    temporary: int  # highest rise above that inside the step
    largest: int  # largest single allocation inside the step
    allocations: int  # number of allocations inside the step
    resident: int | None  # rise of the process's (on a GPU, the device's) memory inside the step; None: unknown

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(peer: str, shape: str, device: torch.device, hyper: Hyper) -> Usage:
    """Run a few steps of one peer and return the memory of the second, from the allocator's own record.

    The record covers what torch allocates; `resident` also covers what compiled code requests from the system.
    """
    sizes: dict[str, int] = {}
    stepper: list[Callable[[], object]] = []

    def build_and_step() -> None:
        params = example(by_name(shape), device)
        sizes["weights"] = sum(param.numel() * param.element_size() for param in params)
        sizes["smallest"] = min(param.numel() * param.element_size() for param in params)
        try:
            built = PEERS[peer].build(params, hyper)
        except (ImportError, RuntimeError, ValueError) as error:
            raise BenchError(f"peer {peer} cannot run on {device}: {error}") from error
        stepper.extend([built.first_step, built.second_step])
        step()

    def step() -> None:
        for half in stepper:
            half()

    with quiet():  # what another peer left behind is freed before, and not during
        before = requested(device)
        lived = sum(allocations(build_and_step, device))
        if device.type == "cuda":  # a GPU's record holds blocks, of up to 1 MB more than was requested
            lived = requested(device) - before
        events = allocations(step, device)
        resident = resident_rise(step, device)
    live = highest = 0
    for size in events:
        live += size
        highest = max(highest, live)
    return Usage(
        peer=peer,
        shape=shape,
        weights=sizes["weights"],
        smallest_tensor=sizes["smallest"],
        kept=lived - 3 * sizes["weights"],
        temporary=highest,
        largest=max(events, default=0),
        allocations=sum(size > 0 for size in events),
        resident=resident,
    )


def allocations(work: Callable[[], None], device: torch.device) -> list[int]:
    """Return the sizes of torch's allocations on `device` while `work` runs, in order; frees are negative."""
    with profile(profile_memory=True) as record:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kind = 1 if device.type == "cuda" else 0  # c10::DeviceType
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["args"]["Ev Idx"])]


def requested(device: torch.device) -> int:
    """Return the bytes of all live tensors on a GPU; 0 on other devices."""
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.current"]) if device.type == "cuda" else 0


def resident_rise(work: Callable[[], None], device: torch.device) -> int | None:
    """Return how far memory in use rises above its start while `work` runs; None if that is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    except OSError:
        return None
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Return a size from Linux's status of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
