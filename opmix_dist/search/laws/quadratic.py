"""Quadratic polynomials for the logarithm of the losses, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opmix_dist.search.laws.base import Law, Observations
from opmix_dist.search.laws.basis import Basis

# Ridges that are tried, for each point of weight 1, on features of unit variance: from none to all of it.
RIDGES = np.logspace(-8, 1, 28)


@dataclass(frozen=True)
class QuadraticLaw:
    """log L_i(u) = intercept_i + linear_i . z + z . curvature_i z in the coordinates z of ``basis``.

    intercept: [D]; linear: [D, r]; curvature: [D, r, r], symmetric; ridge: by which each was fitted [D].
    """

    basis: Basis
    intercept: np.ndarray
    linear: np.ndarray
    curvature: np.ndarray
    ridge: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        z = self.basis.project(candidates)
        bent = np.einsum("mj,djk,mk->md", z, self.curvature, z, optimize=True)
        return np.exp(self.intercept + z @ self.linear.T + bent)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K], along the simplex."""
        z = self.basis.project(u[None])[0]
        slopes = self.linear + 2 * self.curvature @ z  # of log L, in z
        return self.predict(u[None]).T * (slopes @ self.basis.scale.T)


@dataclass(frozen=True)
class Quadratic:
    """Fits log L by ridge regression on 1, z_j and z_j z_k.

    The ridge of each loss is the one with the least squared error of predicting each candidate from the
    others, which a linear fit gives without refits (Allen's PRESS).
    """

    name = "quadratic"
    most_folds = 64

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        basis = Basis.of(observations.candidates)
        features = _features(basis.project(observations.candidates))
        ridge = np.array(
            [
                _best_ridge(features, np.log(loss), weight)
                for loss, weight in zip(observations.losses.T, observations.weights.T, strict=True)
            ]
        )
        law = _solve(basis, features, np.log(observations.losses), observations.weights, ridge)
        points, coefficients = len(features), 1 + features.shape[1]
        warnings = []
        if points < coefficients:
            warnings.append(
                f"{points} candidates do not determine quadratics of {coefficients} coefficients: those that "
                "predict left-out candidates best were taken; use more candidates"
            )
        return law, tuple(warnings)

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits with the ridges of ``law``, one linear solve each; losses [R, M, D], weights [R, M]."""
        assert isinstance(law, QuadraticLaw)
        features = _features(law.basis.project(observations.candidates))
        return [
            _solve(law.basis, features, np.log(loss), weight[:, None] * observations.weights, law.ridge)
            for loss, weight in zip(losses, weights, strict=True)
        ]


def _features(z: np.ndarray) -> np.ndarray:
    """z_j and z_j z_k, j <= k [M, r + r (r + 1) / 2]."""
    j, k = np.triu_indices(z.shape[1])
    return np.hstack([z, z[:, j] * z[:, k]])


def _best_ridge(features: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    """Of RIDGES, the one with the lowest PRESS; features [M, F], target [M], weight [M]."""
    if len(target) < 2 or not features.shape[1]:
        return float(RIDGES[0])
    scaled, _, _ = _standardised(features, weight)
    root = np.sqrt(weight)
    mean = weight @ target / weight.sum()
    left, singular, _ = np.linalg.svd(root[:, None] * scaled, full_matrices=False)
    shrunk = singular**2 / (singular**2 + RIDGES[:, None] * weight.sum())  # [ridges, F]
    aligned = left.T @ (root * (target - mean))
    residual = root * (target - mean) - (shrunk * aligned) @ left.T
    leverage = shrunk @ (left**2).T + weight / weight.sum()  # of the features and of the intercept
    press = ((residual / np.maximum(1 - leverage, 1e-12)) ** 2).sum(axis=1)
    return float(RIDGES[press.argmin()])


def _standardised(features: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of weighted mean 0 and variance 1 [M, F], with their mean and deviation [F]."""
    share = weight / weight.sum()
    mean = share @ features
    deviation = np.sqrt(share @ (features - mean) ** 2)
    deviation = np.where(deviation > 1e-12, deviation, np.inf)  # a feature that never varies plays no part
    return (features - mean) / deviation, mean, deviation


def _solve(
    basis: Basis, features: np.ndarray, target: np.ndarray, weights: np.ndarray, ridge: np.ndarray
) -> QuadraticLaw:
    """Weighted ridge regressions of target [M, D] on features [M, F]; weights [M, D], ridge [D]."""
    num_domains, rank = len(ridge), basis.rank
    j, k = np.triu_indices(rank)
    intercept, linear = np.empty(num_domains), np.empty((num_domains, rank))
    curvature = np.zeros((num_domains, rank, rank))
    for i in range(num_domains):
        scaled, mean, deviation = _standardised(features, weights[:, i])
        weighted = scaled * weights[:, i, None]
        normal = scaled.T @ weighted + ridge[i] * weights[:, i].sum() * np.eye(len(mean))
        centre = weights[:, i] @ target[:, i] / weights[:, i].sum()
        solved = np.linalg.solve(normal, weighted.T @ (target[:, i] - centre)) / deviation
        intercept[i], linear[i] = centre - solved @ mean, solved[:rank]
        curvature[i, j, k] = solved[rank:] / 2  # half of it on each side of the diagonal
        curvature[i] += curvature[i].T
    return QuadraticLaw(basis, intercept, linear, curvature, ridge)
