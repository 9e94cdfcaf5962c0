"""Benchmarks of this package's SAM step against other implementations for PyTorch. Run `python -m bench`."""

import os

# The profiler's own log lines are not results. It reads this variable when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
