"""A disk that is full while a checkpoint is saved: an error, and weights, state and the older checkpoint as they were.

The limit on the size of a file stops a save after any number of bytes, as a full disk would. /dev/full has no room at
all.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import family
from support.backends import NAMES
from support.bits import Snapshot, assert_same_bits
from support.campaign import Campaign
from support.family import WITH_SAM, built, clean, resume
from torch import nn

if sys.platform != "linux":
    pytest.skip("the limits and /dev/full are Linux's", allow_module_level=True)
import resource

BACKENDS = [name for name in NAMES if name != "triton"]
STEPS = 3


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond this size. Python ignores the signal, so that the write is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save_by_name(model: nn.Module, optimizer: Any, file: Path) -> None:
    torch.save(contents(model, optimizer), file)


def save_in_the_old_format(model: nn.Module, optimizer: Any, file: Path) -> None:
    torch.save(contents(model, optimizer), file, _use_new_zipfile_serialization=False)


def save_to_an_open_file(model: nn.Module, optimizer: Any, file: Path) -> None:
    with file.open("wb") as out:
        torch.save(contents(model, optimizer), out)


def save_pickled(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Pickle the optimizer itself, as multiprocessing and some frameworks do."""
    with file.open("wb") as out:
        pickle.dump((model, optimizer), out)


WAYS: list[Callable[[nn.Module, Any, Path], None]] = [
    save_by_name, save_in_the_old_format, save_to_an_open_file, save_pickled
]  # fmt: skip


def load(way: Callable[..., None], file: Path | io.BytesIO) -> Any:
    if way is save_pickled:
        return pickle.loads(file.read_bytes() if isinstance(file, Path) else file.getvalue())
    return torch.load(file, weights_only=True)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    resume(optimizer)
    family.train(model, optimizer, steps)
    clean(optimizer)


def save_on_a_full_disk(seed: int, folder: Path) -> str:
    """Save twice, the second time without room. Return what was lost."""
    draw = random.Random(seed)
    method, backend, way = draw.choice(list(WITH_SAM)), draw.choice(BACKENDS), draw.choice(WAYS)
    what = f"{method} on {backend}, {way.__name__}, seed {seed}"
    model, optimizer = built(method, backend)
    twin, other = built(method, backend)
    train(model, optimizer, range(STEPS))
    train(twin, other, range(STEPS))
    kept, torn = folder / "kept", folder / "torn"
    way(model, optimizer, kept)
    whole, size = kept.read_bytes(), kept.stat().st_size
    before, weights = Snapshot(optimizer), [p.detach().clone() for p in model.parameters()]
    full = draw.random() < 0.2
    room = 0 if full else draw.randrange(size)
    try:
        with room_for(size if full else room):
            way(model, optimizer, Path("/dev/full") if full else torn)
        return f"{what}: no error with room for {room} of {size} bytes"
    except (OSError, RuntimeError):
        pass
    before.assert_unchanged()
    assert_same_bits(model.parameters(), weights)
    if kept.read_bytes() != whole:
        return f"{what}: the older checkpoint has changed"
    if torn.exists():
        try:
            load(way, torn)
            return f"{what}: a file of {torn.stat().st_size} of {size} bytes was loaded"
        except Exception:  # of any kind: the file may end anywhere
            pass
        torn.unlink()
    train(model, optimizer, range(STEPS, 2 * STEPS))
    train(twin, other, range(STEPS, 2 * STEPS))
    assert_same_bits(model.parameters(), twin.parameters())
    # The older checkpoint still takes the run to the same weights.
    if way is save_pickled:
        model, optimizer = load(way, kept)
    else:
        model, optimizer = built(method, backend)
        saved = load(way, kept)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(STEPS, 2 * STEPS))
    assert_same_bits(model.parameters(), twin.parameters())
    return ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_loses_nothing(campaign: Campaign, tmp_path: Path) -> None:
    for seed in campaign.rounds(short=12, share=0.06):
        campaign.count(faults=1)
        if lost := save_on_a_full_disk(seed, tmp_path):
            campaign.lose(lost)
