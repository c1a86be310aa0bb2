"""How simulated losses compare with real ones, over the mixtures tried: arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from opmix_dist.search.problem import Problem

CONSTANT = 1e-12


@dataclass(frozen=True)
class Tried:
    """P points, D domains, losses in nats per token.

    candidates: U [P, K]; mixtures: number of each point's mixture [P]; single: [P] bool, the first point of
    each mixture, which comparisons over mixtures go by (the others reach it by other coefficients); real:
    [P, D], alike where mixtures are; snapshot: [D]; old: the point of going on as before.
    """

    candidates: np.ndarray
    mixtures: np.ndarray
    single: np.ndarray
    real: np.ndarray
    snapshot: np.ndarray
    old: int


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's over two lists of numbers [M]; None where one is constant, or there are fewer than three."""
    if len(first) < 3 or min(np.ptp(first), np.ptp(second)) < CONSTANT:
        return None
    return float(spearmanr(first, second).statistic)


def slope_of(real: np.ndarray, simulated: np.ndarray) -> float | None:
    """Least-squares slope of real [M] on simulated [M] losses; None where the latter are constant."""
    x = simulated - simulated.mean()
    if np.abs(x).max() < CONSTANT:
        return None
    return float(x @ (real - real.mean()) / (x @ x))


@dataclass(frozen=True)
class Agreement:
    """Of simulated [M, D] and real [M, D] losses at M mixtures. gap: simulated minus real.

    mean_gap, largest_gap (absolute): [D]; spearman, slope: of each domain; spearman_objective, regret: of the
    objective. regret: real objective of the mixture that is best simulated, minus the least of all.
    """

    mean_gap: np.ndarray
    largest_gap: np.ndarray
    spearman: list[float | None]
    slope: list[float | None]
    spearman_objective: float | None
    regret: float

    @classmethod
    def of(cls, simulated: np.ndarray, real: np.ndarray, problem: Problem) -> Agreement:
        gap = simulated - real
        columns = range(real.shape[1])
        values, real_values = problem.value(simulated), problem.value(real)
        return cls(
            mean_gap=gap.mean(axis=0),
            largest_gap=np.abs(gap).max(axis=0),
            spearman=[rank_correlation(simulated[:, i], real[:, i]) for i in columns],
            slope=[slope_of(real[:, i], simulated[:, i]) for i in columns],
            spearman_objective=rank_correlation(values, real_values),
            regret=regret(int(values.argmin()), real_values),
        )


def regret(chosen: int, values: np.ndarray) -> float:
    """What the choice of one of M objectives [M] loses against the least of them."""
    return float(values[chosen] - values.min())


def rank_of(chosen: int, values: np.ndarray) -> int:
    """1 where none of the values [M] is lower than the chosen one."""
    return int((values < values[chosen]).sum()) + 1
