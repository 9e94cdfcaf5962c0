"""Worker processes joined by gloo. They start once and run one function after another.

If a function runs longer than its limit on any process, its test fails instead of hanging.
"""

from __future__ import annotations

import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

LIMIT = 60  # seconds per function; the longest needs a fiftieth of it on an idle machine


class NotHereError(Exception):
    """Raised if this torch cannot run a worker's function, so that the test is skipped."""


class Processes:
    """`world` worker processes. `run` calls a module-level function on all of them; its first argument is the rank."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._inboxes = [context.SimpleQueue() for _ in range(self.world)]
        self._outbox = context.Queue()
        self._workers = [
            context.Process(
                target=_work, args=(rank, self.world, self._folder.name, self._inboxes[rank], self._outbox), daemon=True
            )
            for rank in range(self.world)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
        """Return the function's result on each process. Fail with the first error if a process raised one."""
        results = self.outcomes(function, *arguments, limit=limit)
        for rank, (error, _) in enumerate(results):
            assert error is None, f"process {rank}:\n{error}"
        return [value for _, value in results]

    def outcomes(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[tuple[Any, Any]]:
        """Return (the error's text or None, the result) for each process."""
        if not self._workers:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, arguments))
        found: dict[int, tuple[Any, Any]] = {}
        try:
            while len(found) < self.world:
                rank, error, value = self._outbox.get(timeout=limit)
                found[rank] = error, value
        except queue.Empty:
            self.stop()
            missing = sorted(set(range(self.world)) - set(found))
            errors = "\n".join(str(error) for error, _ in found.values() if error)
            raise AssertionError(f"processes {missing} did not finish within {limit} s\n{errors}") from None
        if any(error for error, _ in found.values()):
            self.stop()  # their collectives may no longer match
        for error, _ in found.values():
            if error and NotHereError.__name__ in error:
                pytest.skip(error.strip().splitlines()[-1])
        return [found[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers = []


def _work(rank: int, world: int, folder: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    while True:
        function, arguments = inbox.get()
        torch.manual_seed(0)
        try:
            outbox.put((rank, None, function(rank, *arguments)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
