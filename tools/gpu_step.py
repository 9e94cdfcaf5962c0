"""Measures a SAM step on this machine's GPU, for the CUDA and the Triton backend: launches, host time, memory, graphs.

    python tools/gpu_step.py --out DIR        writes DIR/step.json

The benchmarks measure speed. A measurement that fails is noted in the file with its error, and the others still run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_tables import head, require_gpu
from torch import Tensor, nn

from bench.shapes import by_name
from fused_sam import SAM

BACKENDS = ("cuda", "triton")
MANY = by_name("resnet50")  # 161 tensors
LARGE = by_name("128x1048576")
STEPS = 200
CUDA = torch.device("cuda")


def parameters(shapes: list[tuple[int, ...]], device: torch.device = CUDA) -> list[nn.Parameter]:
    """Return parameters with gradients whose addresses stay."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def step(optimizer: SAM) -> None:
    optimizer.first_step()
    optimizer.second_step()


def kernels_of(run: Callable[[], None]) -> list[str]:
    """Return the names of everything that ran on the GPU, copies and fills included."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name[:200] for e in on_gpu if not getattr(e, "is_user_annotation", False)]


def launches(backend: str) -> dict[str, list[str]]:
    """Return what runs in a settled step: with its own check of the second gradient, without, and with GradScaler's."""
    found = {}
    for way in ("own check", "check_update=False", "GradScaler"):
        optimizer = SAM(
            parameters(MANY), lr=0.1, momentum=0.9, backend=backend, check_update=way != "check_update=False"
        )
        if way == "GradScaler":
            optimizer.found_inf = torch.zeros(1, device=CUDA)  # type: ignore[attr-defined]
        for _ in range(2):
            step(optimizer)
        found[way] = kernels_of(lambda optimizer=optimizer: step(optimizer))  # type: ignore[misc]
    return found


def host_seconds(backend: str, device: torch.device = CUDA) -> dict[str, Any]:
    """Return medians over settled steps of 161 small tensors, in seconds: of a step, and of each Triton launch."""
    from fused_sam.backends.triton import backend as triton

    optimizer = SAM(parameters([(300,)] * 161, device), lr=0.1, momentum=0.9, backend=backend)
    launch, spent, steps = triton.launch, {}, []  # type: ignore[var-annotated]

    def timed(native: Any, memory: Any, name: str, *rest: Any) -> None:
        begin = time.perf_counter_ns()
        launch(native, memory, name, *rest)
        spent.setdefault(name, []).append((time.perf_counter_ns() - begin) * 1e-9)

    triton.launch = timed
    gc.disable()
    try:
        for i in range(STEPS + 20):
            if i == 20:  # by then everything is compiled and warm
                spent.clear()
                steps.clear()
            if i % 10 == 0 and device.type == "cuda":  # the host would wait for a full queue
                torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            step(optimizer)
            steps.append((time.perf_counter_ns() - begin) * 1e-9)
    finally:
        triton.launch = launch
        gc.enable()
    every = [seconds for times in spent.values() for seconds in times]
    return {
        "step": statistics.median(steps),
        "launch": statistics.median(every) if every else None,
        "launches": {name: statistics.median(times) for name, times in spent.items()},
    }


def memory(backend: str) -> dict[str, int]:
    """Return requested bytes: of the weights, kept beyond weights, gradients and momentum, and the rise in a step."""

    def asked_for(which: str) -> int:
        return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])

    gc.collect()
    params = parameters(LARGE)
    weights = sum(p.numel() * p.element_size() for p in params)
    before = asked_for("current")
    optimizer = SAM(params, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        step(optimizer)
    gc.collect()
    kept = asked_for("current") - before - weights
    torch.cuda.reset_peak_memory_stats()
    settled = asked_for("current")
    step(optimizer)
    return {"weights": weights, "kept": kept, "rise": asked_for("peak") - settled}


def captured(backend: str, replays: int = 20) -> dict[str, Any]:
    """Return how many elements differ between a captured step and eager steps, after replays.

    The elements are those of weights and momentum. The step includes forward and backward passes, and the learning rate
    changes.
    """
    torch.manual_seed(0)
    layers = [m for _ in range(12) for m in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(128, 8)).to(CUDA)
    twin = copy.deepcopy(model)
    rates = [torch.tensor(0.05, device=CUDA) for _ in range(2)]
    ours, eager = (
        SAM(m.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3, backend=backend)
        for m, lr in zip((model, twin), rates, strict=True)
    )
    x, y = torch.randn(64, 128, device=CUDA), torch.randn(64, 8, device=CUDA)

    def train(model: nn.Module, optimizer: SAM) -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            nn.functional.mse_loss(model(x), y).backward()
            half(zero_grad=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(model, ours)
            train(twin, eager)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, ours)
    for i in range(replays):
        for rate in rates:
            rate.fill_(0.05 / (1 + i))
        x.normal_()
        graph.replay()
        train(twin, eager)
    pairs: list[tuple[Tensor, Tensor]] = list(zip(model.parameters(), twin.parameters(), strict=True))
    pairs += [(ours.state[p]["momentum_buffer"], eager.state[q]["momentum_buffer"]) for p, q in pairs]
    return {
        "replays": replays,
        "elements": sum(a.numel() for a, _ in pairs),
        "differ": sum(int((a != b).sum()) for a, b in pairs),
        "finite": all(bool(a.isfinite().all()) for a, _ in pairs),
    }


MEASURES: dict[str, Callable[[str], Any]] = {
    "launches": launches,
    "host_seconds": host_seconds,
    "memory": memory,
    "captured": captured,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    require_gpu(parser)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    report: dict[str, Any] = head()
    for backend in BACKENDS:
        for name, measure in MEASURES.items():
            try:
                found = measure(backend)
            except Exception as error:  # the other measurements still count
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
                failed.append(f"{backend}: {name}")
            report.setdefault(backend, {})[name] = found
            (folder / "step.json").write_text(json.dumps(report, indent=1) + "\n")
            print(f"{backend}: {name}: {json.dumps(found)}")
    print(f"failed: {', '.join(failed)}" if failed else "all was measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
