"""The bytes that a step must move, which are the floor for its time."""

from __future__ import annotations

from torch.optim import SGD, Optimizer

# Passes over tensors in the weights' own precision; each read and each write counts once.
NORM = 1  # reads g
PERTURB = 4  # reads w and g, writes w and the backup
FINITE_CHECK = 1  # reads the second gradient, because nothing may change before all of it is known to be finite
UNDO_UPDATE = 3  # reads the backup and g, writes w
COPY = 2  # torch's copy_ reads the source and writes the destination
STATE_BYTES = 4  # momentum and moments are fp32 for weights of any dtype


def step_bytes(numel: int, element_size: int = 4, base: type[Optimizer] = SGD) -> int:
    """Return the bytes that a fused SAM step moves: 44 per fp32 parameter with SGD-momentum, 52 with AdamW."""
    state = 2 if base is SGD else 4  # momentum, or both moments, each read and written
    return ((NORM + PERTURB + FINITE_CHECK + UNDO_UPDATE) * element_size + state * STATE_BYTES) * numel


def copy_bytes(numel: int, element_size: int = 4) -> int:
    """Return the bytes that one `copy_` of as many elements moves: 8 per fp32 element."""
    return COPY * numel * element_size
