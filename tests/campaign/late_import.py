"""Runs parallel regions of torch, forks, and imports the package in the child alone, as a program that may hang."""

from __future__ import annotations

import os
import select
import signal

import torch

LIMIT = 30  # seconds


def in_the_child() -> float:
    from fused_sam import SAM

    # Many small tensors: torch runs each on one thread, and a kernel of the package shares them among all.
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(200)]
    optimizer = SAM(params, rho=0.1, lr=0.25, backend="cpu")
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones(1000)
        half()
    return float(params[-1][-1])


def main() -> None:
    torch.set_num_threads(3)
    torch.randn(10**6).exp().sum()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(in_the_child()).encode())
        os._exit(0)
    os.close(writer)
    ready = select.select([reader], [], [], LIMIT)[0]
    print(os.read(reader, 64).decode() if ready else "hung")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
