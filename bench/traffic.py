"""How many bytes a step has to move: the floor that a step's time is measured against."""

from __future__ import annotations

# Passes over tensors of the parameters' size, each read or write counted once.
NORM = 1  # reads g
PERTURB = 4  # reads w and g, writes w and the backup
FINITE_CHECK = 1  # reads the second gradient: nothing may change before all of it is known to be finite
UNDO_SGD = 5  # reads the backup, g and the momentum, writes w and the momentum
COPY = 2  # torch's copy_: reads the source, writes the destination


def step_bytes(numel: int, element_size: int = 4) -> int:
    """Bytes that a fused SAM step with SGD-momentum moves: 44 a parameter in fp32."""
    return (NORM + PERTURB + FINITE_CHECK + UNDO_SGD) * numel * element_size


def copy_bytes(numel: int, element_size: int = 4) -> int:
    """Bytes that one `copy_` of as many elements moves: 8 an element in fp32."""
    return COPY * numel * element_size
