"""At its end the demo prints its tables and the headline, and writes the JSON file."""

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
from .summary import chosen_lr, last, mean_and_deviation, sentences, stopped
from .sweep import Result
from .versus import Spread, Versus


def protocol(settings: Settings) -> str:
    """Return the protocol of the accuracies in one line."""
    rates = ", ".join(f"{lr:g}" for lr in settings.lrs)
    rho = "rho and " if len(settings.rhos) > 1 and any(m.is_sam for m in settings.methods) else ""
    return (
        f"Constant learning rates {rates}; momentum 0.9, weight decay 5e-4, batches of {settings.batch_size}; "
        f"{rho}early stopping by validation labels that are as wrong; test labels are clean and choose nothing."
    )


def results_table(results: Sequence[Result], settings: Settings) -> Table:
    """Return the table of accuracies of one noise level."""
    rates = len(settings.lrs)
    seeds = f"mean ± deviation of {settings.seeds} seeds" if settings.seeds > 1 else "1 seed"
    table = _table(f"{settings.data}, {results[0].noise:.0%} wrong labels: % right on clean test labels, {seeds}")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("rho", justify="right")
    if rates > 1:
        table.add_column(f"last epoch,\n{rates} rates", justify="right", no_wrap=True)
        table.add_column("last epoch,\nworst rate", justify="right", no_wrap=True)
    table.add_column("last epoch,\nchosen rate", justify="right", no_wrap=True)
    table.add_column("stopped,\nchosen rate", justify="right", no_wrap=True)
    for result in results:
        cells = [mean_and_deviation(last(result, chosen_lr(result))), mean_and_deviation(stopped(result))]
        if rates > 1:
            worst = min(result.runs, key=lambda lr: statistics.fmean(last(result, lr)))
            cells = [mean_and_deviation(last(result)), mean_and_deviation(last(result, worst)), *cells]
        table.add_row(result.method.label, "" if result.rho is None else f"{result.rho:g}", *cells)
    return table


def noise_table(by_noise: Sequence[Sequence[Result]]) -> Table:
    """Return the table of several noise levels: both summaries of every optimizer."""
    table = _table("Over the noise: last epoch, mean of the rates / stopped early at the chosen rate, %")
    table.add_column("wrong labels", justify="right")
    for result in by_noise[0]:
        table.add_column(result.method.label, justify="right", no_wrap=True)
    for results in by_noise:
        cells = (f"{statistics.fmean(last(r)):.1f} / {statistics.fmean(stopped(r)):.1f}" for r in results)
        table.add_row(f"{results[0].noise:.0%}", *cells)
    return table


def versus_table(versus: Versus) -> Table:
    """Return the table of the times of a step."""
    table = _table("Time of a training step, alternately: median (quartiles)")
    for name in ("", "step, ms", "in optimizer, ms", "step / SGD's"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    labels = {
        "sgd": "SGD", "fused": f"SAM, fused ({versus.backend})", "unfused": "SAM, public package",
    }  # fmt: skip
    for name, label in labels.items():
        table.add_row(
            label,
            _spread(versus.step[name], 1e3),
            _spread(versus.optimizer[name], 1e3),
            _spread(versus.over_sgd[name], 1, "x") if name != "sgd" else "",
        )
    return table


def content(settings: Settings, by_noise: Sequence[Sequence[Result]], versus: Versus | None) -> dict[str, Any]:
    """Return what the JSON file holds: settings, machine, every run of every optimizer; times in seconds."""
    levels = []
    for results in by_noise:
        optimizers = [
            {
                "optimizer": result.method.name,
                "passes": result.method.cost(settings.epochs),
                "rho": result.rho,
                "validation_accuracy_of_rho": {f"{rho:g}": score for rho, score in result.scores.items()},
                "chosen_lr": chosen_lr(result),
                "last": last(result),
                "stopped": stopped(result),
                "runs": [
                    {"lr": lr, "seed": run.seed, "best_epoch": run.best_epoch + 1, "curve": asdict(run.curve)}
                    for lr, runs in result.runs.items()
                    for run in runs
                ],
            }
            for result in results
        ]
        levels.append({"noise": results[0].noise, "optimizers": optimizers, "conclusion": sentences(results)})
    return {
        "settings": asdict(settings),
        "protocol": protocol(settings),
        "machine": {
            "fused_sam": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
        },
        "levels": levels,
        "times": versus and asdict(versus),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file; numbers that are not finite become null."""
    path.write_text(json.dumps(_plain(values), allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
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
