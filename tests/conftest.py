"""Fixtures of all tests. They name the backend and remove the environment variable that would choose another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.backends import NAMES, VARIANTS, Variant
from support.campaign import Campaign

# Files of few tests that take a minute or more each: they begin first, so that no worker waits for them at the end.
SLOW = ("test_triton_interpret.py", "test_cuda_machine_code.py", "test_cuda_source.py", "test_random_programs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FUSED_SAM_BACKEND", raising=False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small; tests of threads set the number
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Yield every backend. The C++ backend comes once per instruction set."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of each backend, which chooses its instruction set itself."""
    return request.param


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """Yield the test's part in the campaign, and fail if it has lost a case."""
    part = Campaign(request.node.name)
    yield part
    request.node.user_properties.append(("campaign", part.figures.as_dict()))
    assert not part.figures.lost, "\n".join(part.figures.lost)
