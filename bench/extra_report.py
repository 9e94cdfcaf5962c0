"""Table, targets and plot of the memory that SAM keeps beyond its base optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from rich.table import Table

from bench.extra_memory import Extra
from bench.plot import OURS, STYLE, name_rows, save
from bench.targets import Outcome

SLACK = 0.01  # bytes per parameter, for memory that does not grow with them


def table(found: Iterable[Extra]) -> Table:
    result = Table(
        title="Memory of SAM beyond its base optimizer in the same precision, bytes per parameter of the whole network",
        caption="on every process; it is the backup, which masters make unnecessary and FSDP2 divides",
    )
    result.add_column("training")
    for column in ("base keeps", "SAM keeps", "beyond", "expected"):
        result.add_column(column, justify="right")
    for extra in found:
        result.add_row(
            extra.mode.name, numbers(extra.plain), numbers(extra.sam), numbers(extra.extra), f"{extra.mode.expected:g}"
        )
    return result


def numbers(values: Sequence[float]) -> str:
    """Return the values as text: one number if all processes have the same."""
    texts = [f"{value:.3f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def outcomes(found: Iterable[Extra]) -> list[Outcome]:
    made = []
    for extra in found:
        most, limit = max(extra.extra), extra.mode.expected
        what = f"{extra.mode.name}: bytes per parameter beyond the base optimizer"
        made.append(Outcome(what, f"<= {limit:g}", f"{most:.3f}", most <= limit + SLACK))
    return made


def plot(found: Sequence[Extra], path: Path, machine: str) -> Path:
    """Plot bars of bytes per parameter: the base optimizer's own state, with SAM's on top."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(found) + 1.3))
        for row, extra in enumerate(found):
            plain, beyond = max(extra.plain), max(extra.extra)
            axes.barh(row, plain, height=0.66, color="#94a3b8")
            axes.barh(row, beyond, left=plain, height=0.66, color=OURS)
            axes.annotate(
                f"+{max(beyond, 0):.2f}", (plain + max(beyond, 0), row), xytext=(5, 0), textcoords="offset points",
                va="center", fontweight="bold",
            )  # fmt: skip
        name_rows(axes, [extra.mode.name for extra in found])
        axes.set_xlabel("bytes per parameter on each process: base optimizer's state, and SAM's beyond it")
        axes.set_title("Memory of SAM beyond its base optimizer")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        return save(figure, path, machine)
