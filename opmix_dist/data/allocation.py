"""How many samples of each domain a batch has: within one sample of the target, however rare a domain is.

D domains. Only IEEE-exact operations are used, in an order that the processor has no part in (no ``np.sum``),
so ranks on different machines agree to the last bit.
"""

from __future__ import annotations

import math

import numpy as np

# Rounding in lags and targets; far below one sample, far above the error of a step of 1e6 samples.
TOLERANCE = 1e-9


def allocate(lag: np.ndarray, weights: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a batch over domains so that every domain stays within one sample of its cumulative target.

    Earliest deadline first for the chairman assignment problem (Tijdeman 1980); a unit's window is that of
    Pfair scheduling (Baruah et al. 1996): it may be drawn once the target passes the unit before it, and
    must be by the batch in which the target completes it. With constant weights, from lag 0, |lag| < 1 for
    any weights. When weights change, the mandatory units can exceed the batch, and then no rule that does
    not know the future keeps the bound (Ajtai et al. 1998, Fairness in scheduling): units with the smallest
    fraction are deferred and the rest is settled, see :func:`settle`.

    Args:
        lag: target less drawn before the batch, [D], in [-1, 1].
        weights: [D], sums to 1.
        batch_size: B.

    Returns:
        Samples per domain, int64 [D], summing to B; and target less drawn after them, [D], in (-1, 1) unless
        units were deferred, then in (-1, 2).
    """
    # a sum of 1e-16, not exactly 0, would build up over a long run: the batch's target takes it back
    owed = lag + (batch_size - exact_sum(lag)) * weights
    counts = np.maximum(0, np.floor(owed + TOLERANCE)).astype(np.int64)
    fraction = owed - counts
    optional = batch_size - int(counts.sum())
    if optional > 0:
        counts[_earliest_deadlines(fraction, weights, optional)] += 1
    elif optional < 0:
        # lag <= 1 makes at least as many domains with a mandatory unit as there are units too many
        mandatory = np.flatnonzero(counts > 0)
        counts[mandatory[np.argsort(fraction[mandatory], kind="stable")[:-optional]]] -= 1
    return counts, owed - counts


def _earliest_deadlines(fraction: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` domains whose begun unit is completed by the target soonest; ties by domain order."""
    begun = np.flatnonzero(fraction > TOLERANCE)
    with np.errstate(divide="ignore", over="ignore"):  # weight 0: never completed, last
        deadline = (1 - fraction[begun]) / weights[begun]
    # not argsort: at 2,000 domains finding one value takes a tenth of the time
    last = np.partition(deadline, count - 1)[count - 1]
    sooner = deadline < last
    tied = np.flatnonzero(deadline == last)[: count - int(sooner.sum())]
    return begun[np.append(np.flatnonzero(sooner), tied)]


def settle(lag: np.ndarray) -> np.ndarray:
    """The lags [D] at most 1 and summing to 0 that are nearest to ``lag`` in total change.

    What is cut off above 1, or is missing from the sum, is taken from the other side in proportion.
    """
    settled = np.minimum(lag, 1.0)
    excess = exact_sum(settled)
    side = settled > 0 if excess > 0 else settled < 0
    if side.any():
        settled[side] *= 1 - excess / exact_sum(settled[side])
    return settled


def exact_sum(values: np.ndarray) -> float:
    """The exact sum, rounded once: the same on every machine. A list takes two thirds of an array's time."""
    return math.fsum(values.tolist())
