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
# Where a model is trained on each mixture, the first thousandths of a component matter most, and losses are
# smooth in log(u + OFFSET): on RegMix's tables that takes the error on its test mixtures from 0.39 to 0.14
# nats. Where mixtures are simulated losses are smooth in u. The likelihood of each loss tells which.
OFFSET = 1e-3
# Least noise, of the variance of the losses: keeps the kernel matrix regular.
JITTER = 1e-10


@dataclass(frozen=True)
class Coordinates:
    """What a process takes for near: z = (u - centre) @ scale, or log(u + OFFSET), of unit variance each.

    basis: of the former; centre, scale: of the logarithms [K].
    """

    basis: Basis
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, candidates: np.ndarray) -> Coordinates:
        logs = np.log(candidates + OFFSET)
        deviation = logs.std(axis=0)
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
        return cls(Basis.of(candidates), logs.mean(axis=0), scale)

    def project(self, candidates: np.ndarray, logarithmic: bool) -> np.ndarray:
        """z [M, r] of U [M, K]."""
        if not logarithmic:
            return self.basis.project(candidates)
        return (np.log(candidates + OFFSET) - self.centre) * self.scale

    def slopes(self, u: np.ndarray, logarithmic: bool) -> np.ndarray:
        """du_k of z_j [r, K] at one u [K]."""
        return np.diag(self.scale / (u + OFFSET)) if logarithmic else self.basis.scale.T


@dataclass(frozen=True)
class Kernel:
    """amplitude exp(-|z - z'|^2 / (2 length^2)), and the noise of losses, all of standardised losses [D].

    noise: variance of a typical candidate; logarithmic: whether z is that of log(u + OFFSET).
    """

    amplitude: np.ndarray
    length: np.ndarray
    noise: np.ndarray
    logarithmic: np.ndarray

    def correlations(self, i: int, z: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Covariance of loss i at z [M, r] with that at other [N, r]: [M, N]."""
        return self.amplitude[i] * np.exp(-cdist(z, other, "sqeuclidean") / (2 * self.length[i] ** 2))


@dataclass(frozen=True)
class GaussianProcessLaw:
    """L_i(u) = mean_i + sum_m coefficient_mi k_i(z, z_m), the posterior mean; far from the candidates it is
    mean_i.

    points: U [M, K]; coefficients: [M, D], nats; mean: [D].
    """

    coordinates: Coordinates
    points: np.ndarray
    kernel: Kernel
    coefficients: np.ndarray
    mean: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        columns = []
        for i, logarithmic in enumerate(self.kernel.logarithmic):
            z, points = (self.coordinates.project(u, logarithmic) for u in (candidates, self.points))
            columns.append(self.kernel.correlations(i, z, points) @ self.coefficients[:, i])
        return self.mean + np.column_stack(columns)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K], along the simplex."""
        rows = []
        for i, logarithmic in enumerate(self.kernel.logarithmic):
            z, points = (self.coordinates.project(v, logarithmic) for v in (u[None], self.points))
            pull = self.kernel.correlations(i, z, points)[0] * self.coefficients[:, i]
            slopes = pull @ (points - z) / self.kernel.length[i] ** 2
            rows.append(slopes @ self.coordinates.slopes(u, logarithmic))
        return np.array(rows)


@dataclass(frozen=True)
class GaussianProcess:
    """A process for each loss with a squared-exponential kernel, its numbers by maximum likelihood.

    The noise is estimated, too. Standard errors only say how that of candidates compares: their own size is
    that of the held-out sample, which all candidates share and which bends no law.
    """

    name = "gaussian_process"
    most_folds = 64

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        points = len(observations.candidates)
        coordinates = Coordinates.of(observations.candidates)
        some = np.random.default_rng([seed, points]).permutation(points)[:LIKELIHOOD_POINTS]
        sample = observations.take(some)
        found = [_likeliest(coordinates, sample, i) for i in range(observations.losses.shape[1])]
        kernel = Kernel(*(np.array(numbers) for numbers in zip(*found, strict=True)))
        return _condition(coordinates, kernel, observations, observations.losses, np.ones(points)), ()

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits with the kernel of ``law``; losses [R, M, D], weights [R, M] divide the noise."""
        assert isinstance(law, GaussianProcessLaw)
        return [
            _condition(law.coordinates, law.kernel, observations, target, weight)
            for target, weight in zip(losses, weights, strict=True)
        ]


def _likeliest(
    coordinates: Coordinates, observations: Observations, i: int
) -> tuple[float, float, float, bool]:
    """Amplitude, length and noise of loss i, and whether it is smoother in the logarithm."""
    loss = observations.losses[:, i]
    deviation = loss.std()
    if not coordinates.basis.rank or deviation <= 1e-9 * loss.mean():
        return 0.0, 1.0, 1.0, False
    standardised = (loss - loss.mean()) / deviation
    inputs = [coordinates.project(observations.candidates, logarithmic) for logarithmic in (False, True)]
    plain, logarithmic = (_maximise(z, standardised) for z in inputs)
    return (*logarithmic[1:], True) if logarithmic[0] > plain[0] else (*plain[1:], False)


def _maximise(z: np.ndarray, target: np.ndarray) -> tuple[float, float, float, float]:
    """The largest log likelihood of target [M] at z [M, r]; the amplitude, length and noise it has there."""
    # only for those who ask for a process: scikit-learn takes seconds to import
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-2, 1e4)) * RBF(np.sqrt(z.shape[1]), (0.1, 1e3))
    process = GaussianProcessRegressor(kernel + WhiteKernel(1e-2, (1e-9, 1e1)), alpha=JITTER)
    with warnings.catch_warnings():  # a number at its bound (a linear loss has no length) is an answer
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(z, target)
    amplitude, length, noise = (float(number) for number in np.exp(process.kernel_.theta))
    return float(process.log_marginal_likelihood_value_), amplitude, length, noise


def _condition(
    coordinates: Coordinates,
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
        noise = kernel.noise[i] / (weights * observations.weights[:, i])[used]
        z = coordinates.project(observations.candidates[used], kernel.logarithmic[i])
        covariance = kernel.correlations(i, z, z)
        covariance[np.diag_indices_from(covariance)] += noise + JITTER * kernel.amplitude[i]
        standardised = (losses[used, i] - mean[i]) / deviation[i]
        coefficients[used, i] = deviation[i] * cho_solve(cho_factor(covariance), standardised)
    return GaussianProcessLaw(coordinates, observations.candidates, kernel, coefficients, mean)
