"""Kill a training run (SIGKILL) at its n-th operation, for every n, and resume it from its last checkpoint.

As a program, it forks a child for each run. For each n it prints a line with the resumed run's result.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.amp import GradScaler

from fused_sam import SAM
from support.nets import loss_of, net

STEPS = 3
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "adamw": {"base_optimizer": torch.optim.AdamW, "lr": 0.01},
    "masters": {"lr": 0.1, "momentum": 0.9, "master_weights": True},
    "stochastic": {"lr": 0.1, "momentum": 0.9, "stochastic_rounding": True, "seed": 3},
}


def train(mode: str, file: Path, operation: Callable[[], None]) -> str:
    """Train to the end, from the checkpoint if there is one. Return a digest of weights and state."""
    low = mode in ("masters", "stochastic")
    model = net(dtype=torch.bfloat16 if low else torch.float32)
    optimizer = SAM(model.parameters(), rho=0.2, **MODES[mode])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    start = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        start = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)  # type: ignore[attr-defined]
    for step in range(start, STEPS):
        operation()
        scaler.scale(loss_of(model, step)).backward()
        operation()
        optimizer.first_step(zero_grad=True)
        operation()
        scaler.scale(loss_of(model, step)).backward()
        operation()
        scaler.step(optimizer)
        operation()
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        operation()
        states = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        torch.save({"step": step + 1, **states}, file.with_suffix(".new"))
        operation()
        os.replace(file.with_suffix(".new"), file)
    digest = hashlib.sha256()
    for p in model.parameters():
        for t in (p.detach(), *(optimizer.state[p][k] for k in sorted(optimizer.state[p]))):
            digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_a_child(mode: str, file: Path, die_at: int) -> tuple[int, str]:
    """Run in a process of its own. Return its exit code, negative for a signal, and the digest."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def operation() -> None:
            nonlocal count
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        os.write(writer, train(mode, file, operation).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        digest = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), digest


def main(mode: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # torch's late imports happen here, once, and not in every child
            train(mode, Path(folder) / "imports", lambda: None)
        _, expected = in_a_child(mode, Path(folder) / "whole", -1)
        for die_at in range(7 * STEPS):
            file = Path(folder) / f"killed-{die_at}"
            code, _ = in_a_child(mode, file, die_at)
            _, found = in_a_child(mode, file, -1)
            print(die_at, code, "same" if found == expected and found else "different", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
