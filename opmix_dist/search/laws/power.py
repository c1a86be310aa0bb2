"""Power laws of shares, after BiMix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from opmix_dist.search.laws import robust
from opmix_dist.search.laws.base import Law, Observations
from opmix_dist.search.laws.starts import best_of_starts

# Offsets of a share that are tried. With 0.001 a domain's first thousandth matters as it does where little of
# a domain teaches most of it; with 0.1 the law is near an exponential. Which it is differs between domains.
OFFSETS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class PowerLaw:
    """L_i(x) = exp(c_i) + exp(a_i) prod_j (x_j + e_i)^-alpha_ij, nats per token, x = C^T u.

    With the share of a loss's own domain alone (alpha_ij = 0 elsewhere) it is the form that BiMix (arXiv
    2405.14908) has at a fixed number of steps, A / r^alpha, with a constant beside it, as a loss need not
    vanish, and an offset, as a share may be 0.

    log_c, log_a, offset: [D]; alpha: [D, X]; composition: C [K, X], None: u is x.
    """

    log_c: np.ndarray
    log_a: np.ndarray
    alpha: np.ndarray
    offset: np.ndarray
    composition: np.ndarray | None = None

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        return np.exp(self.log_c) + self._power(candidates)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        slopes = -self._power(u[None]).T * self.alpha / (self._mixtures(u) + self.offset[:, None])  # [D, X]
        return slopes if self.composition is None else slopes @ self.composition.T

    def _mixtures(self, candidates: np.ndarray) -> np.ndarray:
        return candidates if self.composition is None else candidates @ self.composition

    def _power(self, candidates: np.ndarray) -> np.ndarray:
        """The second term [M, D]."""
        logs = np.log(self._mixtures(candidates)[:, None] + self.offset[:, None])  # [M, D, X]
        return np.exp(self.log_a - (logs * self.alpha).sum(axis=2))


@dataclass(frozen=True)
class ConvexPowerLaw(PowerLaw):
    """A power law of which no loss rises with any share: no alpha is negative."""

    def expression(self, u: cp.Variable) -> cp.Expression:
        """The D losses at a variable u [K]: exp of -alpha log x, which is convex."""
        x = u if self.composition is None else self.composition.T @ u
        logs = [alpha @ cp.log(x + e) for alpha, e in zip(self.alpha, self.offset, strict=True)]
        return np.exp(self.log_c) + cp.exp(self.log_a - cp.hstack(logs))


@dataclass(frozen=True)
class Power:
    """Fits a power law to each domain, by Huber regression as the log-linear law is fitted: the two are the
    same in log(x + offset) and in u. The offset with the lowest objective is taken.

    A loss that has the name of a domain depends on the share of that domain alone; another on all shares.
    """

    huber_delta: float = 0.02
    num_starts: int = 16
    name = "power"
    most_folds = 64

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        num_domains, shares = observations.losses.shape[1], observations.mixtures.shape[1]
        everything = np.ones((1, len(observations.candidates)))
        log_c, log_a, offset = np.zeros((3, num_domains))
        alpha, lowest = np.zeros((num_domains, shares)), np.full(num_domains, np.inf)
        warnings: list[str] = []
        for columns, rows in _groups(observations):
            for e in OFFSETS:
                part = _Part(observations, columns, rows, e)
                problems = part.problems(observations.losses[None], everything, self.huber_delta)
                theta, _ = best_of_starts(problems, self.num_starts, seed)
                objective = problems.objective(theta)
                better = objective < lowest[rows]
                at = rows[better]
                lowest[at], offset[at] = objective[better], e
                log_c[at], log_a[at], alpha[at] = (values[better] for values in part.coefficients(theta))
            warnings += part.warnings()
        return _law(log_c, log_a, alpha, offset, observations.composition), tuple(warnings)

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits near ``law``, with its offsets; losses [R, M, D], weights [R, M]."""
        assert isinstance(law, PowerLaw)
        refits = len(losses)
        log_c, log_a = np.empty((2, refits, len(law.alpha)))
        alpha = np.empty((refits, *law.alpha.shape))
        for columns, group in _groups(observations):
            for e in OFFSETS:
                rows = group[law.offset[group] == e]
                if not rows.size:
                    continue
                part = _Part(observations, columns, rows, e)
                problems = part.problems(losses, weights, self.huber_delta)
                theta, _ = robust.minimise(problems, np.tile(part.theta(law), (refits, 1)))
                for target, values in zip((log_c, log_a, alpha), part.coefficients(theta), strict=True):
                    target[:, rows] = values.reshape(refits, len(rows), *values.shape[1:])
        return [
            _law(*coefficients, law.offset, law.composition)
            for coefficients in zip(log_c, log_a, alpha, strict=True)
        ]


def _law(
    log_c: np.ndarray,
    log_a: np.ndarray,
    alpha: np.ndarray,
    offset: np.ndarray,
    composition: np.ndarray | None,
) -> PowerLaw:
    kind = ConvexPowerLaw if (alpha >= 0).all() else PowerLaw
    return kind(log_c, log_a, alpha, offset, composition)


def _groups(observations: Observations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(columns of X, rows of the D losses) that belong together: which shares which losses depend on."""
    domains = list(observations.mixture_domains)
    own = np.array([domains.index(name) if name in domains else -1 for name in observations.names])
    for column in np.unique(own):
        columns = np.array([column]) if column >= 0 else np.arange(observations.mixtures.shape[1])
        yield columns, np.flatnonzero(own == column)


class _Part:
    """Regressions of some losses on log(x + offset) of some shares, in standardised inputs z."""

    def __init__(
        self, observations: Observations, columns: np.ndarray, rows: np.ndarray, offset: float
    ) -> None:
        self.observations, self.columns, self.rows = observations, columns, rows
        logs = np.log(observations.mixtures[:, columns] + offset)
        self.centre, deviation = logs.mean(axis=0), logs.std(axis=0)
        self.scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
        self.z = (logs - self.centre) * self.scale

    def determined(self, used: np.ndarray) -> bool:
        """Whether the candidates used [M] bool determine all coefficients."""
        z, coefficients = self.z[used], len(self.columns) + 2
        inputs = np.column_stack([np.ones(len(z)), z])
        enough = len(np.unique(z, axis=0)) >= coefficients
        return enough and bool(np.linalg.matrix_rank(inputs) == coefficients - 1)

    def problems(self, losses: np.ndarray, weights: np.ndarray, huber_delta: float) -> robust.HuberProblems:
        refits, points, count = len(losses), len(self.z), len(self.rows)
        target = losses[:, :, self.rows].swapaxes(1, 2).reshape(refits * count, points)
        own = np.tile(self.observations.weights[:, self.rows].T, (refits, 1))
        loose = np.repeat([not self.determined(row > 0) for row in weights], count)
        ridge = np.zeros((len(target), 1 + len(self.columns)))
        ridge[loose | robust.is_constant(target)] = robust.RIDGE * points
        return robust.HuberProblems(
            self.z, target, np.repeat(weights, count, axis=0) * own, ridge, huber_delta
        )

    def coefficients(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log c [P], log a [P] and alpha [P, X]."""
        log_c, log_amplitude, exponents = robust.decode(theta, len(self.columns))
        slopes = exponents * self.scale
        alpha = np.zeros((len(theta), self.observations.mixtures.shape[1]))
        alpha[:, self.columns] = -slopes
        return log_c, log_amplitude - slopes @ self.centre, alpha

    def theta(self, law: PowerLaw) -> np.ndarray:
        """Inverse of ``coefficients`` for this part's losses."""
        slopes = -law.alpha[np.ix_(self.rows, self.columns)]
        exponents = np.divide(slopes, self.scale, out=np.zeros_like(slopes), where=self.scale > 0)
        constant = np.exp(law.log_c[self.rows])
        return robust.encode(constant, law.log_a[self.rows] + slopes @ self.centre, exponents)

    def warnings(self) -> Iterator[str]:
        points, names = len(self.z), self.observations.names
        concerned = ", ".join(names[i] for i in self.rows)
        if not self.determined(np.ones(points, dtype=bool)):
            yield (
                f"{points} candidates do not determine power laws of {len(self.columns) + 2} coefficients "
                f"for {concerned}: the flattest laws that fit were taken; use more distinct candidates"
            )
        constant = robust.is_constant(self.observations.losses[:, self.rows].T)
        for i in self.rows[constant]:
            yield f"{names[i]}: the loss is the same for every candidate, so the law is flat"
