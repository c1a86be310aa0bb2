"""Mean errors with what the number of examples says of their precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ErrorRate:
    """Of N examples with errors in 0..1.

    stderr: standard error of the mean, s / sqrt(N), where s^2 is the errors' variance with N - 1; of a single
        example 0.
    low, high: Wilson's interval, which holds near 0 and 1 too, where the standard error is of no use.
    """

    count: int
    mean: float
    stderr: float
    low: float
    high: float

    @classmethod
    def of(cls, errors: np.ndarray) -> ErrorRate:
        """``errors`` [N] float64, N >= 1."""
        count, mean = len(errors), float(errors.mean())
        spread = float(errors.std(ddof=1)) if count > 1 else 0.0
        low, high = wilson_interval(mean, count)
        return cls(count, mean, spread / math.sqrt(count), low, high)


def wilson_interval(share: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927, 209-212), without continuity
    correction. With z the normal quantile,

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Of a mean of fractions in 0..1 it is too wide, if anything: none vary more than 0s and 1s of that mean.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
