"""Mean errors with what the number of examples, and of what they are about, says of their precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ErrorRate:
    """Of N examples with errors in 0..1, in G groups whose examples need not be independent.

    stderr: cluster-robust standard error of the mean e (Miller 2024, Adding Error Bars to Evals, arXiv
        2411.00640), as a ratio of the groups' sums (Cochran, Sampling Techniques, 1977, section
        2.11), with the factor for few groups that goes with it:

            sqrt(G / (G - 1) * sum over groups of (sum over its examples of (e_i - e))^2) / N.

        Of groups of one example each it is s / sqrt(N), where s^2 is the errors' variance with N - 1; of a
        single group, which tells nothing of others, 0.
    low, high: Wilson's interval of ``effective`` examples, which holds near 0 and 1 too, where the standard
        error is of no use.
    effective: independent examples that would tell as much: N times the squared ratio of s / sqrt(N) to
        ``stderr``, at most N. Where errors do not differ, so that nothing tells how alike groups are, G: the
        fewest that it can be; of a single group 1.
    """

    count: int
    groups: int
    mean: float
    stderr: float
    effective: float
    low: float
    high: float

    @classmethod
    def of(cls, errors: np.ndarray, groups: Sequence[str]) -> ErrorRate:
        """``errors`` [N] float64, N >= 1; ``groups`` [N], in which "" is a group of its own each time."""
        count, mean = len(errors), float(errors.mean())
        which = clusters(groups)
        number = int(which.max()) + 1
        alone = float(errors.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        residuals = np.bincount(which, weights=errors - mean)
        stderr = math.sqrt(float(residuals @ residuals) * number / max(number - 1, 1)) / count
        if number == 1:  # its residual is 0 but for rounding
            stderr, effective = 0.0, 1.0
        elif not alone:
            effective = float(number)
        else:
            effective = count * min(1.0, (alone / stderr) ** 2) if stderr else float(count)
        low, high = wilson_interval(mean, effective)
        return cls(count, number, mean, stderr, effective, low, high)


def clusters(groups: Sequence[str]) -> np.ndarray:
    """The number of each example's group, int64 [N], from 0 in the order of first appearance; an example
    whose group is "" has one of its own."""
    numbers: dict[object, int] = {}
    keys = (group or (i,) for i, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def wilson_interval(share: float, count: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
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
