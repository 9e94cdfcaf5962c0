"""Robust summaries of timings: medians and spread, ratios of medians with an interval, a fitted line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Order statistics of one set of samples, in the samples' unit."""

    count: int
    median: float
    q1: float
    q3: float
    min: float
    max: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, and the largest relative distance of a sample from it."""

    intercept: float
    slope: float
    worst: float


def summary(samples: Samples) -> Summary:
    low, q1, median, q3, high = np.percentile(samples, [0, 25, 50, 75, 100]).tolist()
    return Summary(len(samples), median, q1, q3, low, high)


def ratio_of_medians(top: Samples, bottom: Samples, resamples: int = 2000) -> Ratio:
    """Return the median of `top` over that of `bottom`, both [rounds]; rounds are resampled, which keeps pairs."""
    rounds = np.random.default_rng(0).integers(len(top), size=(resamples, len(top)))
    ratios = np.median(top[rounds], axis=1) / np.median(bottom[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return Ratio(float(np.median(top) / np.median(bottom)), low, high)


def fit_line(x: Samples, y: Samples) -> Line:
    """Fit least squares of the relative error, so that samples of every magnitude count alike; y must be above zero."""
    design = np.stack([1 / y, x / y], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    worst = np.abs((intercept + slope * x) / y - 1).max()
    return Line(float(intercept), float(slope), float(worst))
