"""Known losses of mixtures, for searches to find the optimum of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize

from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.methods import MixtureSearch, SearchResult
from opmix_dist.search.problem import Problem
from opmix_dist.search.simplex import Components, sample_candidates


def rebalance(num_domains: int, **settings: Any) -> Problem:
    """`old` is uniform, and a probe per domain with 90% of it."""
    uniform = np.full(num_domains, 1 / num_domains)
    domains = [f"d{i}" for i in range(num_domains)]
    composition = Components.for_rebalance(domains, uniform).matrix
    return Problem(composition, uniform, domains=domains, losses=domains, **settings)


def log_linear_truth(problem: Problem, seed: int) -> LogLinearLaw:
    """Each loss falls with its domain's share, by 0.3 to 1.2 in the exponent, and little with others'."""
    rng = np.random.default_rng([seed, 1])
    num_domains = problem.composition.shape[1]
    own = rng.uniform(0.3, 1.2, num_domains)
    t = -np.diag(own) - rng.uniform(0, 0.15, (num_domains, num_domains))
    amplitude = np.log(rng.uniform(0.5, 1.2, num_domains))
    return LogLinearLaw(
        log_c=np.log(rng.uniform(1.5, 3.0, num_domains)),
        t=t @ problem.composition.T + amplitude[:, None],
    )


@dataclass(frozen=True)
class PowerTruth:
    """L_i(u) = floor_i + a_i (x_i + epsilon)^-alpha_i + b (sum u^2 - 1) + wave sin(2 r_i . u), x = C^T u.

    A power law in the own share, what averaging probes gains, and a wave that no family has: not log-linear,
    and not convex where the waves are steep.
    """

    floor: np.ndarray
    scale: np.ndarray
    alpha: np.ndarray
    averaging: float
    wave: float
    directions: np.ndarray
    composition: np.ndarray
    epsilon: float = 0.05

    @classmethod
    def draw(cls, problem: Problem, seed: int, *, averaging: float = 0.05, wave: float = 0.01) -> PowerTruth:
        rng = np.random.default_rng([seed, 2])
        count, num_domains = problem.composition.shape
        return cls(
            floor=rng.uniform(1.5, 3.0, num_domains),
            scale=rng.uniform(0.1, 0.5, num_domains),
            alpha=rng.uniform(0.2, 0.6, num_domains),
            averaging=averaging,
            wave=wave,
            directions=rng.standard_normal((num_domains, count)),
            composition=problem.composition,
        )

    def predict(self, candidates: np.ndarray) -> np.ndarray:
        share = candidates @ self.composition + self.epsilon
        smooth = self.floor + self.scale * share**-self.alpha
        spread = self.averaging * ((candidates**2).sum(axis=1) - 1)
        return smooth + spread[:, None] + self.wave * np.sin(2 * candidates @ self.directions.T)

    def gradient(self, u: np.ndarray) -> np.ndarray:
        share = u @ self.composition + self.epsilon
        own = -self.alpha * self.scale * share ** (-self.alpha - 1)
        waves = 2 * self.wave * np.cos(2 * self.directions @ u)
        return own[:, None] * self.composition.T + 2 * self.averaging * u + waves[:, None] * self.directions


class Truth(Protocol):
    """Losses [M, D] at U [M, K], and dL_i / du_k [D, K] at one u [K]."""

    def predict(self, candidates: np.ndarray) -> np.ndarray: ...

    def gradient(self, u: np.ndarray) -> np.ndarray: ...


def total(truth: Truth, problem: Problem, u: np.ndarray) -> float:
    return problem.total(truth.predict(u[None])[0], u)


def least_total(truth: Truth, problem: Problem, starts: int = 6) -> float:
    """Of the mean objective without bounds: the best of several quasi-Newton descents over log u."""
    count = len(problem.composition)

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        u = np.exp(z - z.max())
        u /= u.sum()
        x = u @ problem.expanded
        slope = problem.rates(len(truth.predict(u[None])[0])) @ truth.gradient(u)
        slope = slope + problem.kl * problem.expanded @ (np.log(x / problem.prior) + 1)
        return total(truth, problem, u), u * (slope - slope @ u)

    points = np.log(sample_candidates(count, starts, seed=7))
    return min(minimize(value, z, jac=True, method="BFGS", options={"gtol": 1e-7}).fun for z in points)


def run(
    search: MixtureSearch, truth: Truth, *, noise: float = 0.0, seed: int = 0
) -> tuple[SearchResult, np.ndarray]:
    """The result, and all U that were asked. noise: standard deviation of what is added to losses, and told
    of them, and to each dL_i / du_k."""
    rng = np.random.default_rng([seed, 3])
    asked = []
    while (candidates := search.ask()) is not None:
        asked.append(candidates)
        losses = truth.predict(candidates)
        losses = losses + noise * rng.standard_normal(losses.shape)
        gradients = None
        if search.wants_gradients:
            gradients = np.stack([truth.gradient(u) for u in candidates])
            gradients = gradients + noise * rng.standard_normal(gradients.shape)
        search.tell(losses, np.full_like(losses, noise) if noise else None, gradients)
    return search.result(), np.vstack(asked)
