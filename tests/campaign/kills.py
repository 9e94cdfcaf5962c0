"""Trains with checkpoints and ends the run by SIGKILL at random moments, until it has come to its end.

As a program it forks a child for each run, so that torch is imported once. For each seed it prints a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from support import family
from support.backends import NAMES
from support.family import WITH_SAM, built, clean, resume

STEPS = 6
BACKENDS = [name for name in NAMES if name != "triton"]  # Triton's interpreter is too slow
MOST_KILLS = 12  # of one run


def train(method: str, backend: str, file: Path) -> str:
    """Train to the end, from the checkpoint if there is one. Return a digest of weights and state."""
    model, optimizer = built(method, backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        start = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for step in range(start, STEPS):
        resume(optimizer)
        family.train(model, optimizer, range(step, step + 1))
        scheduler.step()
        clean(optimizer)
        torch.save({"step": step + 1, **{k: part.state_dict() for k, part in parts.items()}}, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)
    digest = hashlib.sha256()
    for p in model.parameters():
        for t in (p.detach(), *(optimizer.state[p][k] for k in sorted(optimizer.state[p]))):
            digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_a_child(method: str, backend: str, file: Path, kill_after: float | None) -> tuple[bool, str, float]:
    """Train in a child. Return whether it was killed, the digest, and how many seconds it ran."""
    reader, writer = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, train(method, backend, file).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        digest = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code == -signal.SIGKILL, digest, time.monotonic() - begin


def life(seed: int, folder: Path) -> dict[str, Any]:
    """Return how often one run was killed, and whether it ended as the run that nothing interrupted."""
    draw = random.Random(seed)
    method, backend = draw.choice(list(WITH_SAM)), draw.choice(BACKENDS)
    _, expected, duration = in_a_child(method, backend, folder / f"{seed}-whole", None)
    file, kills, killed, found = folder / f"{seed}-killed", 0, True, ""
    while killed:
        limit = draw.uniform(0.0, 1.1) * duration if kills < MOST_KILLS else None
        killed, found, _ = in_a_child(method, backend, file, limit)
        kills += killed
    torn = list(folder.glob(f"{seed}-killed.new"))
    for path in (file, folder / f"{seed}-whole", *torn):
        path.unlink(missing_ok=True)
    return {
        "seed": seed, "method": method, "backend": backend, "kills": kills, "torn": len(torn),
        "same": bool(expected) and found == expected,
    }  # fmt: skip


def main(seeds: list[int]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):  # torch's late imports happen here, once, and not in every child
            train("SAM", "reference", Path(folder) / f"imports-{k}")
        for seed in seeds:
            print(json.dumps(life(seed, Path(folder))), flush=True)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
