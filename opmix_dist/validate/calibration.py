"""Corrections of simulated losses by real ones, and whether they hold on mixtures they were not fitted to.

With y = real minus snapshot, s = simulated minus snapshot and m = 1 - sum u^2, for domain i:

    shift       y = a_i + s                what all simulations miss alike; changes no difference
    slope       y = a_i + b s              differences are compressed, in all domains alike
    affine      y = a_i + b_i s            the same by domain
    averaging   y = a_i + b s + c m        and what averaging probes gains by itself is taken off

by least squares, each mixture weighing the same. A mixture is left out with all points that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opmix_dist.pool.calibration import Calibration, mixedness
from opmix_dist.search.problem import Problem
from opmix_dist.validate.measures import Tried, rank_correlation, regret
from opmix_dist.validate.records import CalibrationResult

METHODS = ("none", "shift", "slope", "affine", "averaging")
LEAST_MIXTURES = 5
"""With fewer, one left out says nothing: no correction is chosen."""


def fit(
    method: str, tried: Tried, simulated: np.ndarray, rows: np.ndarray, domains: Sequence[str]
) -> Calibration:
    """
    Args:
        simulated: [P, D] at the points of ``tried``.
        rows: [P] bool, the points to fit to.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"no calibration is named {method!r}: there are {', '.join(METHODS)}")
    count = simulated.shape[1]
    y, s = (values[rows] - tried.snapshot for values in (tried.real, simulated))  # [m, D]
    mixed = mixedness(tried.candidates[rows])
    _, place, repeats = np.unique(tried.mixtures[rows], return_inverse=True, return_counts=True)
    weights = np.sqrt(1 / repeats[place])  # [m]
    offset, slope, averaging = np.zeros(count), np.ones(count), np.zeros(count)
    if method == "shift":
        offset = np.average(y - s, axis=0, weights=weights**2)
    elif method == "affine":
        for i in range(count):
            columns = np.stack([np.ones(len(s)), s[:, i]], axis=1)
            offset[i], slope[i] = _solved(columns, y[:, i], weights)
    elif method in ("slope", "averaging"):
        of_domain = np.tile(np.eye(count), (len(s), 1))  # [m D, D]
        columns = np.column_stack([of_domain, s.ravel()])
        if method == "averaging":
            columns = np.column_stack([columns, np.repeat(mixed, count)])
        found = _solved(columns, y.ravel(), np.repeat(weights, count))
        offset, slope = found[:count], np.full(count, found[count])
        if method == "averaging":
            averaging = np.full(count, found[-1])

    def by_domain(values: np.ndarray) -> dict[str, float]:
        return dict(zip(domains, values.tolist(), strict=True))

    return Calibration(
        method=method,
        offset=by_domain(offset),
        slope=by_domain(slope),
        averaging=by_domain(averaging),
        mixtures=len(repeats),
    )


def _solved(columns: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares; of several answers the smallest."""
    return np.linalg.lstsq(columns * weights[:, None], values * weights, rcond=1e-10)[0]


def judged(
    tried: Tried, simulated: np.ndarray, problem: Problem, domains: Sequence[str]
) -> list[CalibrationResult]:
    """Every method, in the order of ``METHODS``."""
    return [_judge(method, tried, simulated, problem, domains) for method in METHODS]


def _judge(
    method: str, tried: Tried, simulated: np.ndarray, problem: Problem, domains: Sequence[str]
) -> CalibrationResult:
    points = np.flatnonzero(tried.single)
    corrected, changes = np.empty((2, len(points), simulated.shape[1]))
    for row, point in enumerate(points):
        rest = tried.mixtures != tried.mixtures[point]
        if not rest.any():
            rest = ~rest
        both = [point, tried.old]
        found = fit(method, tried, simulated, rest, domains).losses(
            simulated[both], tried.candidates[both], tried.snapshot, domains
        )
        corrected[row], changes[row] = found[0], found[0] - found[1]
    real = tried.real[points]
    others = tried.mixtures[points] != tried.mixtures[tried.old]
    wrong = (changes - (real - tried.real[tried.old]))[others]
    values, real_values = problem.value(corrected), problem.value(real)
    return CalibrationResult(
        calibration=fit(method, tried, simulated, np.full(len(simulated), True), domains),
        error=_root_mean_square(corrected - real),
        difference_error=_root_mean_square(wrong),
        spearman_objective=rank_correlation(values, real_values),
        regret=regret(int(values.argmin()), real_values),
    )


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean())) if values.size else 0.0


def choose(found: Sequence[CalibrationResult], wanted: str, mixtures: int) -> CalibrationResult:
    """The method that is wanted; of ``best``, the one with the least error of left-out differences, and none
    where mixtures are too few to tell.

    Args:
        mixtures: that were tried.
    """
    by_name = {one.calibration.method: one for one in found}
    if wanted != "best":
        return by_name[wanted]
    if mixtures < LEAST_MIXTURES:
        return by_name["none"]
    return min(found, key=lambda one: one.difference_error)
