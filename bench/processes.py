"""Several processes, joined by gloo and with one thread each, that run one function together."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bench.errors import BenchError

PATIENCE = timedelta(minutes=2)  # how long a process waits for the others


def together(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run function(rank, world, *arguments) on each of `world` processes, and return the results.

    The function must be at the top level of a module.

    Raises:
        BenchError: torch has no gloo, or a process died.
    """
    if not distributed.is_gloo_available():
        raise BenchError("this torch has no gloo: several processes cannot be measured with it")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder, "meeting"))
        # Each process waits for all others in its first call, so that none takes two calls.
        with ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(work, rank, world, meeting, function, arguments) for rank in range(world)]
            try:
                return [future.result() for future in waiting]
            except BrokenProcessPool as error:
                raise BenchError(f"one of {world} processes died: is there memory for all of them?") from error


def work(rank: int, world: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE
    )
    try:
        return function(rank, world, *arguments)
    finally:
        distributed.destroy_process_group()
