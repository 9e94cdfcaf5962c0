"""The Triton backend: `backend.py` launches the kernels of `passes.py`, `updates.py` and `vectors.py`."""

from .backend import Triton

__all__ = ["Triton"]
