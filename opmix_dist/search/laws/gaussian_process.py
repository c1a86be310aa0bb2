"""Gaussian processes: smooth laws of no particular form."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

from opmix_dist.search.laws.base import Law, Observations
from opmix_dist.search.laws.basis import Basis

# The marginal likelihood takes the cube of the points some fifty times for each loss: so many of them, drawn
# at random, are enough for its three numbers. All points are in the law.
LIKELIHOOD_POINTS = 200
# Least noise, of the variance of the losses: keeps the kernel matrix regular.
JITTER = 1e-10


@dataclass(frozen=True)
class Kernel:
    """amplitude exp(-|z - z'|^2 / (2 length^2)), and the noise of losses, all of standardised losses [D].

    noise: variance where no standard errors are known.
    """

    amplitude: np.ndarray
    length: np.ndarray
    noise: np.ndarray

    def correlations(self, i: int, z: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Covariance of loss i at z [M, r] with that at other [N, r]: [M, N]."""
        return self.amplitude[i] * np.exp(-cdist(z, other, "sqeuclidean") / (2 * self.length[i] ** 2))


@dataclass(frozen=True)
class GaussianProcessLaw:
    """L_i(u) = mean_i + sum_m coefficient_mi k_i(z, z_m), the posterior mean; far from the candidates it is
    mean_i.

    points: z [M, r] in the coordinates of ``basis``; coefficients: [M, D], nats; mean: [D].
    """

    basis: Basis
    points: np.ndarray
    kernel: Kernel
    coefficients: np.ndarray
    mean: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        z = self.basis.project(candidates)
        columns = [
            self.kernel.correlations(i, z, self.points) @ self.coefficients[:, i]
            for i in range(len(self.mean))
        ]
        return self.mean + np.column_stack(columns)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K], along the simplex."""
        z = self.basis.project(u[None])
        slopes = [
            (self.kernel.correlations(i, z, self.points)[0] * self.coefficients[:, i])
            @ (self.points - z)
            / self.kernel.length[i] ** 2
            for i in range(len(self.mean))
        ]
        return np.array(slopes) @ self.basis.scale.T


@dataclass(frozen=True)
class GaussianProcess:
    """A process for each loss with a squared-exponential kernel, its numbers by maximum likelihood.

    Where standard errors are known they are the noise; otherwise it is estimated, the same for all points.
    """

    name = "gaussian_process"
    most_folds = 64

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        basis = Basis.of(observations.candidates)
        z = basis.project(observations.candidates)
        some = np.random.default_rng([seed, len(z)]).permutation(len(z))[:LIKELIHOOD_POINTS]
        found = [_likeliest(z[some], observations.take(some), i) for i in range(observations.losses.shape[1])]
        kernel = Kernel(*np.array(found).T)
        weights = np.ones(len(z))
        return _condition(basis, z, kernel, observations, observations.losses, weights), ()

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits with the kernel of ``law``; losses [R, M, D], weights [R, M] divide the noise."""
        assert isinstance(law, GaussianProcessLaw)
        return [
            _condition(law.basis, law.points, law.kernel, observations, target, weight)
            for target, weight in zip(losses, weights, strict=True)
        ]


def _likeliest(z: np.ndarray, observations: Observations, i: int) -> tuple[float, float, float]:
    """Amplitude, length and noise of loss i."""
    # only for those who ask for a process: scikit-learn takes seconds to import
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    loss = observations.losses[:, i]
    deviation = loss.std()
    if not z.shape[1] or deviation <= 1e-9 * loss.mean():
        return 0.0, 1.0, 1.0
    kernel = ConstantKernel(1.0, (1e-2, 1e4)) * RBF(np.sqrt(z.shape[1]), (0.1, 1e3))
    if observations.stderr is None:
        kernel, known = kernel + WhiteKernel(1e-2, (1e-9, 1e1)), JITTER
    else:
        known = (observations.stderr[:, i] / deviation) ** 2 + JITTER
    process = GaussianProcessRegressor(kernel, alpha=known)
    with warnings.catch_warnings():  # a number at its bound (a linear loss has no length) is an answer
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(z, (loss - loss.mean()) / deviation)
    numbers = np.exp(process.kernel_.theta)
    noise = numbers[2] if observations.stderr is None else 0.0
    return float(numbers[0]), float(numbers[1]), float(noise)


def _condition(
    basis: Basis,
    z: np.ndarray,
    kernel: Kernel,
    observations: Observations,
    losses: np.ndarray,
    weights: np.ndarray,
) -> GaussianProcessLaw:
    """The posterior mean of losses [M, D]; a weight [M] of 0 leaves a point out."""
    used = weights > 0
    mean, deviation = losses[used].mean(axis=0), losses[used].std(axis=0)
    coefficients = np.zeros_like(losses)
    for i in np.flatnonzero((kernel.amplitude > 0) & (deviation > 0)):
        noise = np.full(int(used.sum()), kernel.noise[i])
        if observations.stderr is not None:
            noise = (observations.stderr[used, i] / deviation[i]) ** 2
        covariance = kernel.correlations(i, z[used], z[used])
        covariance[np.diag_indices_from(covariance)] += noise / weights[used] + JITTER * kernel.amplitude[i]
        standardised = (losses[used, i] - mean[i]) / deviation[i]
        coefficients[used, i] = deviation[i] * cho_solve(cho_factor(covariance), standardised)
    return GaussianProcessLaw(basis, z, kernel, coefficients, mean)
