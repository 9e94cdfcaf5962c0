"""What a self-test found: as a table for people, as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fused_sam.info import __version__


@dataclass(frozen=True)
class Result:
    """One check of one backend on one type of device. `message` says what is wrong; empty if nothing is."""

    backend: str
    device: str
    subject: str
    dtypes: str
    message: str


@dataclass
class Report:
    """All checks, the rates of whole steps in GB/s, and the backends that cannot run here with their reasons."""

    results: list[Result] = field(default_factory=list)
    rates: dict[tuple[str, str], float | None] = field(default_factory=dict)
    untested: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if something was checked and nothing is wrong."""
        return bool(self.results) and not self.differences

    @property
    def differences(self) -> list[Result]:
        """The checks that found something wrong."""
        return [result for result in self.results if result.message]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the head and the rows of a table: a row per subject, a column per backend and device."""
        places = list(dict.fromkeys((r.backend, r.device) for r in self.results))
        subjects = list(dict.fromkeys(r.subject for r in self.results))
        cells: dict[tuple[str, str, str], list[bool]] = {}
        for r in self.results:
            cells.setdefault((r.subject, r.backend, r.device), []).append(not r.message)
        rows = [[subject, *(_cell(cells.get((subject, *place), [])) for place in places)] for subject in subjects]
        if any(self.rates.get(place) for place in places):
            rates = (self.rates.get(place) for place in places)
            rows.append(["a step, GB/s", *("-" if rate is None else f"{rate:.1f}" for rate in rates)])
        return ["check", *(f"{backend} on {device}" for backend, device in places)], rows

    def lines(self) -> list[str]:
        """Return the lines below the table: differences, untested backends, and the verdict."""
        lines = [
            f"DIFFERS: {r.backend} on {r.device}, {r.subject}, {r.dtypes}: {_one_line(r.message)}"
            for r in self.differences
        ]
        lines += [f"not tested: {name}: {_one_line(reason)}" for name, reason in self.untested.items()]
        wrong, total = len(self.differences), len(self.results)
        verdict = f"{wrong} of {total} checks differ from reference" if wrong else f"all {total} checks agree"
        return [*lines, f"{verdict if total else 'no backend can run here'} ({self.seconds:.1f} s)"]

    def text(self) -> str:
        """Return the table and the lines below it as plain text."""
        head, rows = self.rows()
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        padded = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in (head, *rows))
        return "\n".join([*("  ".join(row).rstrip() for row in padded), "", *self.lines()])

    def show(self) -> None:
        """Print the table by rich if it is installed, else as plain text."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self.text())
            return
        head, rows = self.rows()
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        console = Console(highlight=False)
        console.print(table)
        for line in self.lines():
            console.print(line, markup=False, soft_wrap=True)

    def json(self) -> str:
        """Return the report as JSON."""
        report: dict[str, Any] = {
            "ok": self.ok,
            "seconds": round(self.seconds, 2),
            "versions": {"fused_sam": __version__, "torch": torch.__version__},
            "rates": [
                {"backend": backend, "device": device, "gb_per_second": rate}
                for (backend, device), rate in self.rates.items()
            ],
            "untested": self.untested,
            "checks": [asdict(result) for result in self.results],
        }
        return json.dumps(report, indent=1)


def _cell(passed: list[bool]) -> str:
    if not passed:
        return "-"
    return f"{len(passed)} ok" if all(passed) else f"{passed.count(False)} of {len(passed)} DIFFER"


def _one_line(text: str) -> str:
    return " ".join(text.split())
