"""Takes steps, forks, and takes the same steps in the parent and in the child, as a program that may hang.

Arguments: backends. It prints a line per case, which ends with the digests of the child's and of the parent's weights.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch  # and not yet the package, for the first case
from torch import Tensor, nn

SHAPES = [(300_001,), (70, 1000), (33,)]  # large enough for several threads
STEPS = 2
LIMIT = 20  # seconds for a child, which needs less than one


def gradients() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(4 * STEPS)]


def digest(params: list[nn.Parameter]) -> str:
    found = hashlib.sha256()
    for p in params:
        found.update(p.detach().numpy().tobytes())
    return found.hexdigest()


def steps(optimizer: Any, params: list[nn.Parameter], grads: list[list[Tensor]], rest: bool = False) -> None:
    """Take steps with these gradients; with `rest`, finish the step that is half done first."""
    for k, values in enumerate(grads):
        for p, g in zip(params, values, strict=True):
            p.grad = g
        half = optimizer.second_step if (k % 2 == 0) == rest else optimizer.first_step
        half()


def in_a_child(work: Callable[[], str]) -> str:
    """Return what the work returns in a forked child, or "hung"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    ready = select.select([reader], [], [], LIMIT)[0]
    found = os.read(reader, 64).decode() if ready else "hung"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found or "failed"


def first_loaded_by_the_child() -> str:
    """Take steps over many small tensors, whose backward passes torch runs on one thread. Return a digest."""
    from fused_sam import SAM

    params = [nn.Parameter(torch.ones(1000)) for _ in range(200)]
    optimizer = SAM(params, rho=0.1, lr=0.25, backend="cpu")
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones(1000)
        half()
    return digest(params)


def fork(backend: str, where: str, alone: bool) -> tuple[str, str]:
    """Return the digests of the child's and of the parent's weights.

    Args:
        where: "between steps", "perturbed" in the middle of a step, or "combining" gradients in one.
        alone: True if the child sets one thread.
    """
    from fused_sam import GSAM, SAM

    drawn = gradients()
    params = [nn.Parameter(torch.ones(s)) for s in SHAPES]
    method = GSAM if where == "combining" else SAM
    optimizer = method(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    half = where != "between steps"
    before = 2 * STEPS + half
    steps(optimizer, params, drawn[:before])

    def work() -> str:
        if alone:
            torch.set_num_threads(1)
        steps(optimizer, params, drawn[before:], half)
        return digest(params)

    found = in_a_child(work)
    steps(optimizer, params, drawn[before:], half)
    return found, digest(params)


def main(backends: list[str]) -> None:
    torch.set_num_threads(3)
    torch.randn(10**6).exp().sum()  # torch's own parallel region
    if "cpu" in backends:
        assert "fused_sam" not in sys.modules
        child = in_a_child(first_loaded_by_the_child)
        print("cpu, first loaded by the child,", child, first_loaded_by_the_child(), flush=True)
    # torch's own parallel regions hang in a forked child, too, unless it sets one thread. The backends that are torch's
    # operations need that. The kernels of "cpu" do not.
    for backend in backends:
        for where in ("between steps", "perturbed", "combining"):
            for alone in (False, True) if backend == "cpu" and where != "combining" else (True,):
                print(backend, where, "alone" if alone else "all", *fork(backend, where, alone), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
