"""Several processes beside the tests, joined by gloo: started once, given one function after another.

A function that runs longer than its limit, on any process, fails the test instead of hanging it.
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

LIMIT = 60  # seconds a function may take: fifty times what the longest needs on an idle machine


class NotHereError(Exception):
    """What a worker was asked for cannot be had with this torch: the test is skipped."""


class Processes:
    """`world` workers. `run` calls a module-level function on all of them, with the rank as its first argument."""

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
        """What the function returned on each process; the first process's error where it raised one."""
        results = self.outcomes(function, *arguments, limit=limit)
        for rank, (error, _) in enumerate(results):
            assert error is None, f"process {rank}:\n{error}"
        return [value for _, value in results]

    def outcomes(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[tuple[Any, Any]]:
        """For each process (the error's text or None, the result)."""
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
            self.stop()  # their collectives may be out of step now
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
