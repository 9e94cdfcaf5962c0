"""The one exception of the benchmarks."""


class BenchError(ValueError):
    """What was asked for cannot be done. The message says in one line what is wrong and what to do."""
