"""Fixtures of all tests: a backend to run on, and nothing of the environment that would choose another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.backends import NAMES, VARIANTS, Variant


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FUSED_SAM_BACKEND", raising=False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is tested is small; tests of threads set their number
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Every backend, the C++ one once for each instruction set."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend, with the instruction set it would choose."""
    return request.param
