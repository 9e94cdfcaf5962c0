"""The one exception of the benchmarks: what was asked for cannot be done."""


class BenchError(ValueError):
    """Says what is wrong and what to do, in one line."""
