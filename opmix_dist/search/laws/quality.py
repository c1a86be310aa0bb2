"""How well a law holds, for every family alike: from refits without the candidates that are predicted."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from opmix_dist.search.laws import robust
from opmix_dist.search.laws.base import Family, Law, LawFit, Observations

FOLDS = 10


def fit_with_quality(family: Family, observations: Observations, *, seed: int) -> LawFit:
    """The law of a family and its quality, as ``LawFit`` describes it."""
    law, warnings = family.fit(observations, seed=seed)
    losses = observations.losses
    predicted = law.predict(observations.candidates)
    left_out = predict_left_out(family, observations, law, seed=seed)
    constant = robust.is_constant(losses.T)
    with np.errstate(over="ignore"):  # a law that explodes at the point left out: inf says so
        loo_error = np.sqrt(((left_out - losses) ** 2).mean(axis=0))
    return LawFit(
        law=law,
        family=family.name,
        fitter=family,
        observations=observations,
        predicted=predicted,
        left_out=left_out,
        r2=np.where(constant, np.nan, _r2(losses, predicted)),
        spearman=np.where(constant, np.nan, _spearman(losses, predicted)),
        loo_error=loo_error,
        calibration=np.where(constant, np.nan, _slope(left_out, losses)),
        warnings=warnings,
    )


def predict_left_out(family: Family, observations: Observations, law: Law, *, seed: int) -> np.ndarray:
    """Each candidate's losses [M, D] as predicted by a law of others; nan for a single candidate."""
    points = len(observations.candidates)
    if points < 2:
        return np.full_like(observations.losses, np.nan)
    folds = draw_folds(points, points if points <= family.most_folds else FOLDS, seed=seed)
    weights = np.ones((len(folds), points))
    for row, fold in zip(weights, folds, strict=True):
        row[fold] = 0.0
    losses = np.broadcast_to(observations.losses, (len(folds), *observations.losses.shape))
    left_out = np.empty_like(observations.losses)
    for fold, other in zip(
        folds, family.fit_many(observations, losses, weights, law, seed=seed), strict=True
    ):
        left_out[fold] = other.predict(observations.candidates[fold])
    return left_out


def draw_folds(points: int, count: int, *, seed: int) -> list[np.ndarray]:
    """Numbers of the points in ``count`` parts of equal size, but for one point, drawn at random."""
    return np.array_split(np.random.default_rng([seed, points]).permutation(points), min(count, points))


def _slope(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Slopes [D] of measured regressed on predicted, both [M, D]; nan where predicted is constant."""
    a, b = predicted - predicted.mean(axis=0), measured - measured.mean(axis=0)
    square = (a**2).sum(axis=0)
    return np.divide((a * b).sum(axis=0), square, out=np.full_like(square, np.nan), where=square > 0)


def _r2(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """1 - residual / total sum of squares of [M, D] arrays [D]; nan where measured is constant."""
    total = ((measured - measured.mean(axis=0)) ** 2).sum(axis=0)
    residual = ((measured - predicted) ** 2).sum(axis=0)
    return 1 - np.divide(residual, total, out=np.full_like(total, np.nan), where=total > 0)


def _spearman(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Correlation of the ranks of [M, D] arrays [D]; nan where one is constant."""
    a, b = (ranks - ranks.mean(axis=0) for ranks in (rankdata(measured, axis=0), rankdata(predicted, axis=0)))
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), norm, out=np.full_like(norm, np.nan), where=norm > 0)
