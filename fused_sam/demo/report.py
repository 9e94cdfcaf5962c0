"""At its end the demo prints two tables and one sentence, and writes the JSON file."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from fused_sam.info import __version__

from .options import Settings
from .training import Clock
from .tuning import Outcome
from .versus import Spread, Versus

# A mean difference of more than this number of standard errors counts as a win or a loss.
SIGNIFICANT_ERRORS = 2.0


def results_table(outcomes: Sequence[Outcome], epochs: int) -> Table:
    """Return the table of accuracies, costs and times per optimizer."""
    seeds = len(outcomes[0].runs)
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    table = _table(f"Accuracy on clean test labels ({spread})")
    table.add_column("optimizer", no_wrap=True)
    for name in ("lr", "rho", "passes", "accuracy, %", "ms/step", "in optimizer"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        clock = Clock.median([run.clock for run in outcome.runs])
        table.add_row(
            outcome.method.label,
            f"{outcome.winner.lr:g}",
            "" if outcome.winner.rho is None else f"{outcome.winner.rho:g}",
            str(outcome.method.cost(epochs)),
            accuracy(outcome),
            f"{clock.total * 1e3:.2f}",
            f"{clock.optimizer / clock.total:.0%}",
        )
    return table


def versus_table(versus: Versus) -> Table:
    """Return the table of times of fused and unfused SAM."""
    table = _table("SAM's step, fused and unfused alternately, median (quartiles)")
    table.add_column("")
    for name in (f"fused ({versus.backend})", "unfused", "unfused / fused"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = (
        ("optimizer, ms", versus.fused_optimizer, versus.unfused_optimizer, versus.optimizer_ratio),
        ("whole step, ms", versus.fused_step, versus.unfused_step, versus.step_ratio),
    )
    for name, fused, unfused, ratio in rows:
        table.add_row(name, _spread(fused, 1e3), _spread(unfused, 1e3), _spread(ratio, 1, "x"))
    return table


def accuracy(outcome: Outcome) -> str:
    """Return the mean test accuracy in %, with its standard deviation over seeds."""
    values = [100 * run.test_accuracy for run in outcome.runs]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def closing_sentence(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence about SAM's gain over each other optimizer, compared seed by seed on the same data."""
    sam = next((outcome for outcome in outcomes if outcome.method.is_sam), None)
    others = [outcome for outcome in outcomes if not outcome.method.is_sam]
    if sam is None or not others:
        reached = (f"{outcome.method.phrase} reaches {accuracy(outcome)} %" for outcome in outcomes)
        return f"On clean test labels {' and '.join(reached)}."
    comparisons = [_comparison(sam, other) for other in others]
    return f"On clean test labels SAM {', and '.join(comparisons)}."


def _comparison(sam: Outcome, other: Outcome) -> str:
    gains = [100 * (a.test_accuracy - b.test_accuracy) for a, b in zip(sam.runs, other.runs, strict=True)]
    gain, name = statistics.fmean(gains), other.method.phrase
    if len(gains) == 1:
        return f"is {abs(gain):.1f} points {'ahead of' if gain > 0 else 'behind'} {name} on the one seed"
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    size = f"{abs(gain):.1f} ± {error:.1f} points"
    ahead = f"ahead on {sum(g > 0 for g in gains)} of {len(gains)} seeds"
    if abs(gain) <= SIGNIFICANT_ERRORS * error:
        return f"is not clearly apart from {name} ({gain:+.1f} ± {error:.1f} points, {ahead})"
    return f"{'beats' if gain > 0 else 'loses to'} {name} by {size} ({ahead})"


def write_json(path: Path, settings: Settings, outcomes: Sequence[Outcome], versus: Versus | None) -> None:
    """Write settings, machine, every trial's validation accuracy and every run of the winners; times in seconds."""
    content = {
        "settings": asdict(settings),
        "machine": {
            "fused_sam": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "outcomes": [
            {
                "optimizer": outcome.method.name,
                "passes": outcome.method.cost(settings.epochs),
                "trials": [
                    {"lr": trial.lr, "rho": trial.rho, "validation_accuracy": score}
                    for trial, score in zip(outcome.trials, outcome.validation, strict=True)
                ],
                "chosen": {"lr": outcome.winner.lr, "rho": outcome.winner.rho},
                "runs": [{key: value for key, value in asdict(run).items() if key != "trial"} for run in outcome.runs],
            }
            for outcome in outcomes
        ],
        "fused_against_unfused": versus and asdict(versus),
        "conclusion": closing_sentence(outcomes),
    }
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: paths become text, and numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _spread(spread: Spread, factor: float, unit: str = "") -> str:
    low, median, high = (factor * x for x in (spread.low, spread.median, spread.high))
    return f"{median:.2f}{unit} ({low:.2f}-{high:.2f})"
