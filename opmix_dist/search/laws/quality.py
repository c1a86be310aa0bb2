"""How well a law holds, for every family alike: from refits without the candidates that are predicted."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from opmix_dist.search.laws.base import Family, Law, LawFit, Observations


def with_quality(
    family: Family, observations: Observations, law: Law, warnings: tuple[str, ...], *, seed: int
) -> LawFit:
    """The fit of ``law`` with its quality, as ``LawFit`` describes it."""
    losses = observations.losses
    predicted = law.predict(observations.candidates)
    left_out = predict_left_out(family, observations, law, seed=seed)
    constant = np.ptp(losses, axis=0) <= 1e-9 * losses.mean(axis=0)
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
    """Each candidate's losses [M, D] as predicted by a law of all others."""
    points = len(observations.candidates)
    if points < 2:
        return np.full_like(observations.losses, np.nan)
    losses = np.broadcast_to(observations.losses, (points, *observations.losses.shape))
    laws = family.fit_many(observations, losses, 1 - np.eye(points), law, seed=seed)
    rows = [law.predict(u[None])[0] for law, u in zip(laws, observations.candidates, strict=True)]
    return np.array(rows)


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
