"""How many cases a test of the campaign draws: a few fixed ones in `make test`, new ones in `make campaign`.

tests/campaign/__main__.py is the program that runs the long form and collects what the tests have counted.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

# Set by `make campaign`. The seconds are those of the whole campaign, of which each test takes its share.
SECONDS, CASES, SEED = "FUSED_SAM_CAMPAIGN_SECONDS", "FUSED_SAM_CAMPAIGN_CASES", "FUSED_SAM_CAMPAIGN_SEED"

on_round: list[Callable[[], None]] = []  # called before each case, for a progress bar


@dataclass
class Figures:
    """What a test has drawn, and what of it went wrong."""

    cases: int = 0
    faults: int = 0
    lost: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Campaign:
    """The part of one test in the campaign. Tests get it as the fixture `campaign`.

    Attributes:
        figures: what the test has counted so far.
        long: True in `make campaign`.
    """

    def __init__(self, test: str) -> None:
        self.test = test
        self.figures = Figures()
        self.seconds = float(os.environ.get(SECONDS, "0"))
        self.limit = int(os.environ.get(CASES, "0"))
        self.seed = int(os.environ.get(SEED, "0"))
        self.long = self.seconds > 0 or self.limit > 0

    def rounds(self, short: int, share: float, *, longest: int = 10**9, counts: bool = True) -> Iterator[int]:
        """Yield the seeds of the cases.

        Args:
            short: how many cases `make test` has, with the same seeds every time.
            share: the part of the campaign's time that this test may take, from 0 to 1.
            longest: the most cases that are of use.
            counts: False if the test counts its cases itself.
        """
        draw = random.Random(f"{self.seed} {self.test}")
        count = short if not self.long else min(self.limit or longest, longest)
        begin = time.monotonic()
        for k in range(count):
            if self.long and not self.limit and k and time.monotonic() - begin >= share * self.seconds:
                break
            for call in on_round:
                call()
            self.figures.cases += counts
            yield k if not self.long else draw.randrange(2**31)

    def number(self, short: int, long: int) -> int:
        """Return how many cases a test of fixed length has."""
        return long if self.long else short

    def count(self, *, cases: int = 0, faults: int = 0) -> None:
        """Count cases that `rounds` has not, and faults that were injected."""
        self.figures.cases += cases
        self.figures.faults += faults

    def lose(self, what: str) -> None:
        """Note a case that went wrong. The test goes on, and fails at its end."""
        self.figures.lost.append(what)
