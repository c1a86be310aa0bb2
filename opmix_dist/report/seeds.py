"""Means, deviations and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Spread:
    """Of n values: their mean, and their sample standard deviation (n - 1), None where there is one value."""

    n: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """ValueError without values."""
        if not values:
            raise ValueError("no values")
        return cls(len(values), *_mean_and_deviation(values))


@dataclass(frozen=True)
class Difference(Spread):
    """Of n differences that are paired by seed."""

    low: float | None
    high: float | None
    """Ends of the t interval of the mean; None where there is one pair."""

    @property
    def certain(self) -> bool:
        """The whole interval is on one side of 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def paired(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float
) -> Difference | None:
    """``values`` minus ``baseline`` over the seeds that both have; None where there are none.

    The interval is mean ± t * deviation / sqrt(n), with Student's t of n - 1 degrees of freedom: it takes the
    differences for draws of a normal distribution, and says what other seeds would do.

    Args:
        values, baseline: by seed.
        confidence: of the interval, between 0 and 1.
    """
    found = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not found:
        return None
    mean, deviation = _mean_and_deviation(found)
    if deviation is None:
        return Difference(1, mean, None, None, None)
    n = len(found)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Difference(n, mean, deviation, mean - half, mean + half)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    with np.errstate(invalid="ignore"):  # a loss may have diverged to inf
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
