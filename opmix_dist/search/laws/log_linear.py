"""The log-linear law of OP-Mix, all domains and all starts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from opmix_dist.search.laws import robust
from opmix_dist.search.laws.base import Law, Observations

# Weight per point of the ridge on (curvature, slopes) where the data do not determine a law. In these
# coordinates a slope is the change of loss for one standard deviation of u: it is biased by one millionth.
RIDGE = 1e-6
# exp(t . u) that differs more than e^10-fold between components is noise that was fitted, not a law.
STEEP = 10.0


@dataclass(frozen=True)
class LogLinearLaw:
    """L_i(u) = exp(c_i) + exp(t_i . u), nats per token (OP-Mix, arXiv 2605.15220; the form of Data Mixing
    Laws, arXiv 2403.16952).

    log_c: c [D]; t: [D, K].
    """

    log_c: np.ndarray
    t: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        return np.exp(self.log_c) + np.exp(candidates @ self.t.T)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        return np.exp(self.t @ u)[:, None] * self.t

    def expression(self, u: cp.Variable) -> cp.Expression:
        """The D losses at a cvxpy variable u [K]: convex, as sums of exponentials are."""
        return np.exp(self.log_c) + cp.exp(self.t @ u)


@dataclass(frozen=True)
class _Basis:
    """Whitened coordinates z = (u - centre) @ scale of the directions in which the candidates differ.

    centre: [K]; scale: [K, r]. The rows of U sum to 1, so r is at most K - 1: the overall shift of t lies
    outside and becomes the law's amplitude. Directions that no candidate visits get no slope.
    """

    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, candidates: np.ndarray) -> _Basis:
        centre = candidates.mean(axis=0)
        _, spread, directions = np.linalg.svd(candidates - centre, full_matrices=False)
        kept = spread > 1e-9
        return cls(centre, directions[kept].T * (np.sqrt(len(candidates)) / spread[kept]))

    def project(self, candidates: np.ndarray) -> np.ndarray:
        return (candidates - self.centre) @ self.scale

    def law(self, theta: np.ndarray) -> LogLinearLaw:
        log_c, log_amplitude, exponents = robust.decode(theta)
        t = exponents @ self.scale.T  # [D, K]
        return LogLinearLaw(log_c, t + (log_amplitude - t @ self.centre)[:, None])

    def theta(self, law: LogLinearLaw) -> np.ndarray:
        """[D, 2 + r] of a law; inverse of ``law`` where that law has no slopes outside of the basis."""
        exponents = law.t @ np.linalg.pinv(self.scale).T
        return robust.encode(np.exp(law.log_c), law.t @ self.centre, exponents)


@dataclass(frozen=True)
class LogLinear:
    """Fits a log-linear law to each domain.

    Minimises the sum of Huber(L_i(u_m) - loss_mi) over the candidates: residuals of the losses themselves,
    in nats, not of their logarithms, as the public code that OP-Mix fits with does (allenai/olmix, after
    Data Mixing Laws, arXiv 2403.16952; threshold 0.02). Each start draws exp(c) below the smallest loss and
    perturbs the slopes of the regression of log(loss - exp(c)).

    Where candidates are fewer than coefficients, or losses constant, the answer is the flattest law that
    fits (ridge), with a warning.

    huber_delta: residual, in nats, from which the penalty grows linearly; num_starts: starts per domain, the
    best of them is the answer.
    """

    huber_delta: float = 0.02
    num_starts: int = 64
    name = "log_linear"

    def __post_init__(self) -> None:
        if not self.huber_delta > 0 or self.num_starts < 1:
            raise ValueError(
                f"need huber_delta > 0 and num_starts >= 1, got {self.huber_delta} and {self.num_starts}"
            )

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        candidates, target = observations.candidates, observations.losses.T
        basis = _Basis.of(candidates)
        z = basis.project(candidates)  # [M, r]
        constant = np.ptp(target, axis=1) <= 1e-9 * target.mean(axis=1)
        too_few = _too_few(candidates, basis)
        ridge = np.where(constant | too_few, RIDGE * len(z), 0.0)
        problems = robust.HuberProblems(z, target, np.ones_like(target), ridge, self.huber_delta)
        theta, converged = _best_of_starts(problems, self.num_starts, seed)
        law = basis.law(theta)
        warnings = _warnings(observations.names, law, len(candidates), too_few, constant, converged)
        return law, tuple(warnings)

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits near ``law``; losses [R, M, D], weights [R, M]."""
        assert isinstance(law, LogLinearLaw)
        refits, points, num_domains = losses.shape
        basis = _Basis.of(observations.candidates)
        short = [_too_few(observations.candidates[row > 0], basis) for row in weights]
        problems = robust.HuberProblems(
            basis.project(observations.candidates),
            losses.transpose(0, 2, 1).reshape(refits * num_domains, points),
            np.repeat(weights, num_domains, axis=0),
            RIDGE * points * np.repeat(np.array(short, dtype=np.float64), num_domains),
            self.huber_delta,
        )
        theta, _ = robust.minimise(problems, np.tile(basis.theta(law), (refits, 1)))
        return [basis.law(part) for part in theta.reshape(refits, num_domains, -1)]


def _too_few(candidates: np.ndarray, basis: _Basis) -> bool:
    """Whether candidates [M, K] do not determine the K + 1 coefficients of a law."""
    components = candidates.shape[1]
    return len(np.unique(candidates, axis=0)) < components + 1 or basis.scale.shape[1] < components - 1


def _best_of_starts(
    problems: robust.HuberProblems, num_starts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """theta [D, 2 + r] of the lowest objective per domain, and whether it had converged [D]."""
    num_domains = len(problems.target)
    starts = _starts(problems, num_starts, np.random.default_rng(seed))  # [S, D, 2 + r]
    repeated = problems.take(np.tile(np.arange(num_domains), num_starts))
    theta, converged = robust.minimise(repeated, starts.reshape(num_starts * num_domains, -1))
    objective = repeated.objective(theta).reshape(num_starts, num_domains)
    best = objective.argmin(axis=0) * num_domains + np.arange(num_domains)
    return theta[best], converged[best]


def _starts(problems: robust.HuberProblems, num_starts: int, rng: np.random.Generator) -> np.ndarray:
    """Starts [S, D, 2 + r]; a domain's do not depend on the other domains, the first has exact slopes."""
    target, z = problems.target, problems.z
    share = (np.arange(num_starts) + rng.uniform(0.05, 0.95, num_starts)) / num_starts
    noise = 1 + 0.5 * rng.standard_normal((num_starts, 1, z.shape[1]))
    noise[0] = 1
    constant = share[:, None] * target.min(axis=1)  # [S, D]
    logs = np.log(target - constant[..., None])  # [S, D, M]
    slopes = logs @ z / len(z) * noise  # z^T z = M: this is the least-squares regression
    flat = slopes.reshape(num_starts * len(target), -1)
    theta = robust.encode(constant.ravel(), logs.mean(axis=2).ravel(), flat)
    return theta.reshape(num_starts, len(target), -1)


def _warnings(
    names: Sequence[str],
    law: LogLinearLaw,
    points: int,
    too_few: bool,
    constant: np.ndarray,
    converged: np.ndarray,
) -> Iterator[str]:
    if too_few:
        yield (
            f"{points} candidates do not determine laws of {law.t.shape[1] + 1} coefficients: "
            "the flattest laws that fit were taken; use more distinct candidates"
        )
    for i, name in enumerate(names):
        if constant[i]:
            yield f"{name}: its loss is the same for every candidate, so its law is flat"
        if not converged[i]:
            yield f"{name}: the fit of its law did not converge in {robust.MAX_ITERATIONS} iterations"
        if np.ptp(law.t[i]) > STEEP:
            yield f"{name}: its law is too steep to trust away from the candidates; use more candidates"
