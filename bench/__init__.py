"""Benchmarks: this package's SAM step beside what else PyTorch users have. Run `python -m bench`."""

import os

# The profiler's own log lines are not results; it reads this when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
