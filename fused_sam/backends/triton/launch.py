"""How kernels are launched: the first time through Triton, later without its binding of arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .device import Device
from .memory import Memory
from .requirements import interpreting
from .tables import Native

# A string is the array of that name in a table's memory.
Argument = str | Tensor | float

# The launchers of compiled kernels, by name and constants.
Launchers = dict[tuple[str, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]


def launch(
    native: Native,
    memory: Memory,
    name: str,
    programs: int,
    arguments: tuple[Argument, ...],
    constants: tuple[Any, ...],
) -> None:
    """Run a kernel over a table, by so many programs; a reduction by no more than the device holds at a time.

    Triton binds and inspects the arguments of every launch, which takes 20 us of Python for these kernels. What it
    compiles once fits every call. All launches but the first therefore pass plain addresses to the compiled kernel.
    """
    launcher = native.launchers.get((name, constants))
    if launcher is not None:
        run, values = launcher
        at = memory.addresses
        run(*[at[a] if type(a) is str else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], *values)
        return
    tensors = tuple(memory.tensor(a) if isinstance(a, str) else a for a in arguments)
    _first_launch(native.launchers, name, programs, tensors, constants, native.blocks.warps, native.device)


def launch_once(
    launchers: Launchers, name: str, arguments: tuple[Tensor | float, ...], constants: tuple[Any, ...]
) -> None:
    """Run a kernel that needs no table, in one program."""
    launcher = launchers.get((name, constants))
    if launcher is None:
        _first_launch(launchers, name, 1, arguments, constants, 1)
        return
    run, values = launcher
    run(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], *values)


def _first_launch(
    launchers: Launchers,
    name: str,
    programs: int,
    arguments: tuple[Tensor | float, ...],
    constants: tuple[Any, ...],
    warps: int,
    device: Device | None = None,
) -> None:
    """Run a kernel through Triton, and keep its compiled form for the launches that follow."""
    import triton.language as tl

    from .kernels import KERNELS, REDUCTIONS

    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    values = tuple(dtypes.get(c, c) if isinstance(c, torch.dtype) else c for c in constants)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if name in REDUCTIONS and device is not None and not interpreting():
        compiled = KERNELS[name].warmup(*arguments, *values, grid=(1,), **options)
        _ = compiled[(1, 1, 1)]  # loads it onto the device, which tells its registers
        programs = min(programs, device.programs_that_fit(getattr(compiled, "n_regs", None) or 0, warps))
    compiled = KERNELS[name][(programs,)](*arguments, *values, **options)
    if not interpreting():
        launchers[(name, constants)] = (compiled[(programs, 1, 1)], values)
