"""The device of a table, and how the table's tensors are cut into blocks for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

# Most programs of a reduction on a processor, which holds 2048 threads at a time: 8 times 256.
PROGRAMS = 8


@dataclass(frozen=True)
class Device:
    """A device, with the numbers that decide how kernels are launched on it."""

    device: torch.device
    processors: int
    warp: int  # threads
    registers: int = 0  # of a processor; 0 if they do not limit its programs in a known way

    @property
    def programs(self) -> int:
        """Most programs of a reduction."""
        return PROGRAMS * self.processors

    def programs_that_fit(self, registers: int, warps: int) -> int:
        """Return how many programs of a reduction the device holds at a time.

        More would wait until the first have ended, and take as long again. A processor has four parts. A part gives
        registers to whole warps, in units of 8 per thread.

        Args:
            registers: of a thread of the compiled kernel; 0 if unknown.
            warps: of a program.
        """
        if not (registers and self.registers):
            return self.programs
        warps_of_part = self.registers // 4 // (self.warp * (-(-registers // 8) * 8))
        return min(PROGRAMS, max(4 * warps_of_part // warps, 1)) * self.processors

    @property
    def slots(self) -> int:
        """Slots for the programs' sums: a power of 2, because Triton's ranges need one."""
        return 1 << (self.programs - 1).bit_length()

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    def capturing(self) -> bool:
        """Return True while a CUDA graph is captured on the current stream."""
        if self.device.type == "cpu":
            return False
        capturing = getattr(self._module, "is_current_stream_capturing", None)
        return capturing is not None and capturing()

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which launches go to this device."""
        if self.device.type == "cpu" or self._module.current_device() == self.device.index:
            return nullcontext()
        return self._module.device(self.device)


@lru_cache
def device_of(device: torch.device) -> Device:
    """Return the numbers of a device."""
    if device.type == "cpu":  # the interpreter: few processors, so that small tests have many blocks per program
        return Device(device, 4, 32, 1 << 16)
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    nvidia = device.type == "cuda" and torch.version.hip is None
    registers = getattr(properties, "regs_per_multiprocessor", 1 << 16) if nvidia else 0
    return Device(device, processors, getattr(properties, "warp_size", 32), registers)


@dataclass(frozen=True)
class Blocks:
    """How tensors are cut into blocks."""

    size: int  # elements per block
    warps: int  # per block
    count: int
    first: list[int]  # first block of each tensor

    @staticmethod
    def cut(sizes: Sequence[int], device: Device) -> Blocks:
        """Cut into blocks of 2048 elements for 256 threads, or 512 for 64 if a processor had fewer than two blocks.

        Eight elements per thread are one 16-byte access of a bf16 column and two of an fp32 column. They leave enough
        registers for six blocks per processor in perturb and sgd (40 registers in fp32), and three in adam (72). Six
        blocks keep 150 KB of an fp32 update in flight, and adam's three 98. An H100 needs 20 and a B200 45 (a latency
        of 0.7 us times the bandwidth). More elements per thread gain nothing; with fewer, looking up the addresses
        costs relatively more.
        """
        size, threads = (2048, 256) if sum(sizes) >= 2 * 2048 * device.processors else (512, 64)
        ends = list(accumulate(-(-n // size) for n in sizes))
        return Blocks(size, max(threads // device.warp, 1), ends[-1], [0, *ends[:-1]])
