"""The long form of the campaign: the tests of all promises, with new cases for minutes, and their figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from support import campaign

from bench.machine import processor
from campaign.promises import TESTS, all_tests


class Collector:
    """A plugin of pytest that collects what the tests have counted."""

    def __init__(self, on_test: Any) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.on_test = on_test

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.on_test(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("[")[0].removeprefix("tests/")
        found = self.tests.setdefault(name, {"runs": 0, "skipped": 0, "cases": 0, "faults": 0, "lost": []})
        if report.skipped:
            found["skipped"] += 1
            found.setdefault("reasons", []).append(report.longrepr[2] if report.longrepr else "")  # type: ignore[index]
        if report.failed and report.when != "teardown":
            found["lost"].append(f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}")
        if report.when == "call" and not report.skipped:
            found["runs"] += 1
        if report.when == "teardown":
            figures = dict(report.user_properties).get("campaign")
            if isinstance(figures, dict):
                found["cases"] += figures["cases"]
                found["faults"] += figures["faults"]
                found["lost"] += figures["lost"]


def machine() -> str:
    gigabytes = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    python, cores = platform.python_version(), os.cpu_count()
    return f"{processor()}, {cores} cores, {gigabytes} GB, torch {torch.__version__}, Python {python}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="about how long it takes (15)")
    parser.add_argument("--cases", type=int, default=0, help="the cases of each test, instead of a time")
    parser.add_argument("--seed", type=int, default=None, help="a number that gives the same cases again")
    parser.add_argument("-k", dest="select", default="", help="which tests, as pytest's option")
    parser.add_argument("--json", type=Path, default=Path("build/campaign.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.cases < 0:
        parser.error("--minutes must be above 0, and --cases a whole number of 0 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    seconds = 60 * options.minutes
    os.environ.update({
        campaign.SECONDS: str(seconds), campaign.CASES: str(options.cases), campaign.SEED: str(seed)
    })  # fmt: skip
    size = f"--cases {options.cases}" if options.cases else f"--minutes {options.minutes:g}"
    selected = f' -k "{options.select}"' if options.select else ""
    command = f"make campaign ARGS='{size} --seed {seed}{selected}'"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    log = options.json.with_suffix(".log")
    console = Console(file=os.fdopen(os.dup(sys.stdout.fileno()), "w"))  # pytest captures the usual one
    console.print(f"{command}\non {machine()}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    begin = time.monotonic()
    with Progress(*columns, console=console) as bar, log.open("w") as out, redirect_stdout(out):
        task = bar.add_task("collecting", total=seconds if not options.cases else None)

        def advance() -> None:
            bar.update(task, completed=time.monotonic() - begin)

        def name(test: str) -> None:
            bar.update(task, description=test.rpartition("::")[2][:60])
            advance()

        campaign.on_round.append(advance)
        collector = Collector(name)
        tests = [str(TESTS / test) for test in all_tests()]
        code = pytest.main(
            ["-p", "no:cacheprovider", "-q", *(["-k", options.select] if options.select else []), *tests],
            plugins=[collector],
        )
    figures = {
        "command": command, "machine": machine(), "seconds": round(time.monotonic() - begin), "tests": collector.tests
    }  # fmt: skip
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    lost = [text for test in collector.tests.values() for text in test["lost"]]
    for text in lost:
        console.print(text, style="red", markup=False)
    totals = {key: sum(test[key] for test in collector.tests.values()) for key in ("cases", "faults", "skipped")}
    console.print(
        f"{totals['cases']:,} cases, {totals['faults']:,} faults, {len(lost):,} lost, "
        f"{totals['skipped']:,} tests skipped; figures in {options.json}, pytest's own words in {log}"
    )
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
