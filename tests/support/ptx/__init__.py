"""An interpreter of PTX, the code that nvcc and Triton generate for NVIDIA GPUs. It needs NumPy and no GPU.

The lanes of several blocks are the elements of arrays. Blocks run in random order, and change turns at barriers,
fences, atomics and stores to shared memory. Loads and stores work on the host's memory. They are checked:

- bounds: every access lies in one of the launch's regions, or in the block's shared memory
- alignment: every address is a multiple of the access's size
- races: two warps access a place, one of them writes, and no barrier, or fence with an atomic, orders the two
- unpublished stores: other blocks get the old value until a fence publishes the new one

What cannot be seen here: faults of ptxas and of the hardware, times, and the error of approximations such as
ex2.approx, which are computed exactly. An opcode that is not implemented is an error with its name.

| file | subject |
|---|---|
| `parser.py` | text to kernels with instructions |
| `arithmetic.py`, `conversions.py` | instructions on registers |
| `access.py` | instructions on memory, and between the lanes of a warp |
| `memory.py`, `order.py` | memory and its checks; which accesses are ordered |
| `machine.py` | a launch: blocks, lanes, branches and barriers |
"""

from __future__ import annotations

from .errors import PtxError, UnknownOpcodeError
from .machine import Options, launch
from .memory import Region
from .parser import Kernel, kernels_of

__all__ = ["Kernel", "Options", "PtxError", "Region", "UnknownOpcodeError", "kernels_of", "launch"]
