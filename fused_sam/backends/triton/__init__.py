"""The Triton backend.

| file | subject |
|---|---|
| `backend.py`, `requirements.py` | the contract, and what the backend needs of a machine |
| `layout.py`, `tables.py`, `memory.py`, `device.py` | tables in device memory: what lies where, and what is sent when |
| `launch.py`, `kernels.py` | launches, and the kernels by name |
| `norm.py`, `perturb.py`, `vectors.py` | kernels |
| `update.py`, and a file per rule such as `lion.py` | kernels of the update rules, and what they share |
| `blocks.py`, `rng.py` | what all kernels share |
"""

from .backend import Triton

__all__ = ["Triton"]
