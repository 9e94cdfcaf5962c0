"""Device memory for the Triton backend's tables: arrays in one piece of it, and pinned memory to fill it from.

A CUDA graph replays its copies from the host's memory as that is at the replay. So what a capture copies from is pinned
memory that is never written again, taken from a reserve that was set aside before.
"""

from __future__ import annotations

import struct
from array import array
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.contract import status_dtype

WORD = 8  # bytes; sizes and offsets are in words


class Memory:
    """Named arrays in one piece of device memory, and their picture on the host.

    Args:
        changing: words of each array that is sent again when it has changed.
        fixed: words of each array that is sent once.
        unsent: words of each array that only kernels write.
    """

    def __init__(self, device: torch.device, changing: dict[str, int], fixed: dict[str, int], unsent: int) -> None:
        sizes = {**changing, **fixed, "slots": unsent}
        ends = list(accumulate(sizes.values()))
        self._sizes = sizes
        self._place = dict(zip(sizes, [0, *ends], strict=False))
        self.changing = sum(changing.values())
        self.sent = self.changing + sum(fixed.values())
        self.chooses = False  # whether a group's share is below 1
        self.words = torch.empty(ends[-1], dtype=torch.int64, device=device)
        self.picture = array("q", bytes(self.sent * WORD))
        self._bytes = memoryview(self.picture).cast("B")
        self.addresses = {name: self.words.data_ptr() + place * WORD for name, place in self._place.items()}
        self._dtypes = {
            **dict.fromkeys(("owner", "counter"), torch.int32),
            **dict.fromkeys(("hyper", "unit"), torch.float32),
            "slots": status_dtype(device),
        }

    def tensor(self, name: str) -> Tensor:
        """An array on the device."""
        start = self._place[name]
        return self.words[start : start + self._sizes[name]].view(self._dtypes.get(name, torch.int64))

    def write(self, name: str, words: array[int]) -> None:
        """Into the picture, from the array's beginning."""
        assert len(words) <= self._sizes[name]
        start = self._place[name]
        self.picture[start : start + len(words)] = words

    def write_packed(self, name: str, offset: int, layout: str, *values: float) -> None:
        """Into the picture, `offset` words behind the array's beginning; `layout` as in the module struct."""
        assert 0 <= offset < self._sizes[name]
        struct.pack_into(layout, self._bytes, (self._place[name] + offset) * WORD, *values)

    def send(self, words: int) -> None:
        """Copy the first `words` of the picture to the device."""
        source = torch.frombuffer(self.picture, dtype=torch.int64, count=words)
        if self.words.device.type != "cpu":
            source = source.pin_memory()  # torch's allocator reuses it only when the copy is done
        self.words[:words].copy_(source, non_blocking=True)

    def send_in_graph(self, pinned: Tensor) -> None:
        """The same of all that is sent, out of memory that stays as it is; while a graph is captured."""
        pinned.copy_(torch.frombuffer(self.picture, dtype=torch.int64))
        self.words[: self.sent].copy_(pinned, non_blocking=True)


class Reserve:
    """Pinned memory for captures, set aside before: none can be had from the driver while a graph is captured."""

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = 0
        self._drawn = False
        self._kept: list[Any] = []  # what graphs use: it lives as long as the optimizer

    def keep(self, used: Any) -> None:
        self._kept.append(used)

    def stock(self, memory: Memory, *, fresh: bool) -> None:
        """Outside captures: set aside enough for four tables like this one, if it is new or something was taken."""
        if not (fresh or self._drawn) or memory.words.device.type != "cuda":
            return
        words, self._drawn = memory.sent, False
        if self._piece is None or self._piece.numel() - self._used < 4 * words:
            self._piece = torch.empty(max(8 * words, 1 << 14), dtype=torch.int64, pin_memory=True)
            self._used = 0

    def take(self, words: int) -> Tensor:
        if self._piece is None or self._piece.numel() - self._used < words:
            raise RuntimeError(
                "a CUDA graph of a step is captured before any step has run as it is: "
                "run one step with gradients for the same parameters first, then capture"
            )
        piece = self._piece[self._used : self._used + words]
        self._used += words
        self._drawn = True
        self.keep(piece)
        return piece
