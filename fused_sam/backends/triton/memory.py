"""Device memory of the Triton backend's tables, and the host memory that fills it.

The replay of a CUDA graph copies from host memory as it is at the replay. A capture therefore copies from pinned memory
that is not written after the capture. It comes from a reserve that was allocated earlier.
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

_DTYPES = {"block_row": torch.int32, "ticket": torch.int32, "groups": torch.float32, "one": torch.float32}


class Memory:
    """Named arrays in one piece of device memory, and their image on the host.

    Args:
        changing: words of each array that is sent again when it has changed.
        fixed: words of each array that is sent once.
        slots: words of the array "slots", which only kernels write.
    """

    def __init__(self, device: torch.device, changing: dict[str, int], fixed: dict[str, int], slots: int) -> None:
        sizes = {**changing, **fixed, "slots": slots}
        ends = list(accumulate(sizes.values()))
        self._sizes = sizes
        self._start = dict(zip(sizes, [0, *ends], strict=False))
        self.changing = sum(changing.values())
        self.sent = self.changing + sum(fixed.values())
        self.masked = False  # True if a group's mask_prob is below 1
        self.words = torch.empty(ends[-1], dtype=torch.int64, device=device)
        self.image = array("q", bytes(self.sent * WORD))
        self._bytes = memoryview(self.image).cast("B")
        self._pinned: Tensor | None = None  # what a captured copy reads
        self.addresses = {name: self.words.data_ptr() + start * WORD for name, start in self._start.items()}

    def tensor(self, name: str) -> Tensor:
        """Return an array on the device."""
        start = self._start[name]
        dtype = status_dtype(self.words.device) if name == "slots" else _DTYPES.get(name, torch.int64)
        return self.words[start : start + self._sizes[name]].view(dtype)

    def write(self, name: str, words: array[int]) -> None:
        """Write words into the image, at the array's beginning."""
        assert len(words) <= self._sizes[name]
        start = self._start[name]
        self.image[start : start + len(words)] = words

    def write_packed(self, name: str, offset: int, form: str, *values: float) -> None:
        """Write values into the image, `offset` words behind the array's beginning.

        Args:
            form: as in the module struct.
        """
        assert 0 <= offset < self._sizes[name]
        struct.pack_into(form, self._bytes, (self._start[name] + offset) * WORD, *values)

    def send(self, words: int) -> None:
        """Copy the first `words` of the image to the device."""
        source = torch.frombuffer(self.image, dtype=torch.int64, count=words)
        if self.words.device.type != "cpu":
            source = source.pin_memory()  # torch's allocator reuses it only when the copy is done
        self.words[:words].copy_(source, non_blocking=True)

    def capture_send(self, pinned: Tensor) -> None:
        """Capture a copy of the whole image to the device, which reads `pinned` at each replay."""
        self._pinned = pinned
        self.update_capture()
        self.words[: self.sent].copy_(pinned, non_blocking=True)

    def update_capture(self) -> None:
        """Let the captured copy send what the image holds now; only before the capture ends."""
        assert self._pinned is not None
        self._pinned.copy_(torch.frombuffer(self.image, dtype=torch.int64))


class Reserve:
    """Pinned memory for captures, allocated earlier: the driver allocates none while a graph is captured."""

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = 0
        self._taken = False  # True if something was taken since the last `stock`
        self._kept: list[Any] = []  # what graphs use; it lives as long as the optimizer

    def keep(self, used: Any) -> None:
        """Keep an object alive for the graphs that use it."""
        self._kept.append(used)

    def stock(self, memory: Memory, *, new: bool) -> None:
        """Allocate enough for four tables of this size if the table is new or something was taken; not in a capture."""
        if not (new or self._taken) or memory.words.device.type != "cuda":
            return
        words, self._taken = memory.sent, False
        if self._piece is None or self._piece.numel() - self._used < 4 * words:
            self._piece = torch.empty(max(8 * words, 1 << 14), dtype=torch.int64, pin_memory=True)
            self._used = 0

    def take(self, words: int) -> Tensor:
        """Return so much of the reserve, for one captured copy."""
        if self._piece is None or self._piece.numel() - self._used < words:
            raise RuntimeError(
                "a CUDA graph of a step is captured before a step has run in the same way: "
                "run one step with gradients for the same parameters first, then capture"
            )
        piece = self._piece[self._used : self._used + words]
        self._used += words
        self._taken = True
        self.keep(piece)
        return piece
