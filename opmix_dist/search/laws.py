"""The laws of a search: from coefficients u over components to the loss of each domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from opmix_dist.search import robust
from opmix_dist.search.simplex import require_simplex

# Weight per point of the ridge on (curvature, slopes) where the data do not determine a law. In these
# coordinates a slope is the change of loss for one standard deviation of u: it is biased by one millionth.
RIDGE = 1e-6
# Elements of the largest array [problems, points] of one leave-one-out pass: 16 MB.
LEAVE_ONE_OUT_ELEMENTS = 2_000_000
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

    def predict(self, candidates: np.ndarray) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        return np.exp(self.log_c) + np.exp(candidates @ self.t.T)

    def gradient(self, u: np.ndarray) -> np.ndarray:
        """dL_i / du_k [D, K] at one u [K]."""
        return np.exp(self.t @ u)[:, None] * self.t


@dataclass(frozen=True)
class LawFit:
    """A law and how well it holds, per domain.

    objective: Huber sum over the candidates [D]; r2 and spearman: predicted against measured losses of the
    candidates that were fitted [D], nan where the losses are constant; loo_error: root mean square error, in
    nats, of predicting each candidate from a fit to all others [D], nan for a single candidate;
    measured, predicted: losses [M, D].
    """

    law: LogLinearLaw
    objective: np.ndarray
    r2: np.ndarray
    spearman: np.ndarray
    loo_error: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    warnings: tuple[str, ...]


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


def fit_log_linear(
    candidates: np.ndarray,
    losses: np.ndarray,
    *,
    huber_delta: float = 0.02,
    num_starts: int = 64,
    seed: int,
    domains: Sequence[str] | None = None,
) -> LawFit:
    """Fit a law to each domain, all domains and starts at once.

    Minimises the sum of Huber(L_i(u_m) - loss_mi) over the candidates: residuals of the losses themselves,
    in nats, not of their logarithms, as the public code that OP-Mix fits with does (allenai/olmix, after
    Data Mixing Laws, arXiv 2403.16952; threshold 0.02). Each start draws exp(c) below the smallest loss and
    perturbs the slopes of the regression of log(loss - exp(c)).

    Where candidates are fewer than coefficients, or losses constant, the answer is the flattest law that
    fits (ridge), with a warning.

    Args:
        candidates: U [M, K], rows on the simplex.
        losses: [M, D], nats per token, above 0.
        huber_delta: residual, in nats, from which the penalty grows linearly.
        num_starts: starts per domain; the best of them is the answer.
        domains: D names for messages; their numbers otherwise.

    Raises:
        ValueError: wrong shapes, rows off the simplex, or a loss that is not finite and above 0.
    """
    names = [f"domain {i}" for i in range(np.shape(losses)[-1])] if domains is None else list(domains)
    candidates, losses = _checked(candidates, losses, names)
    if not huber_delta > 0 or num_starts < 1:
        raise ValueError(f"need huber_delta > 0 and num_starts >= 1, got {huber_delta} and {num_starts}")
    basis = _Basis.of(candidates)
    z, target = basis.project(candidates), losses.T  # [M, r], [D, M]
    constant = np.ptp(target, axis=1) <= 1e-9 * target.mean(axis=1)
    components = candidates.shape[1]
    too_few = len(np.unique(candidates, axis=0)) < components + 1 or z.shape[1] < components - 1
    ridge = np.where(constant | too_few, RIDGE * len(z), 0.0)
    problems = robust.HuberProblems(z, target, np.ones_like(target), ridge, huber_delta)
    theta, converged = _best_of_starts(problems, num_starts, seed)
    law = basis.law(theta)
    predicted = law.predict(candidates)
    return LawFit(
        law=law,
        objective=problems.huber(theta),
        r2=np.where(constant, np.nan, _r2(losses, predicted)),
        spearman=np.where(constant, np.nan, _spearman(losses, predicted)),
        loo_error=_leave_one_out(problems, theta, short=len(z) <= components + 1),
        measured=losses,
        predicted=predicted,
        warnings=tuple(_warnings(names, law, len(candidates), too_few, constant, converged)),
    )


def _checked(
    candidates: np.ndarray, losses: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    candidates, losses = np.asarray(candidates, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if candidates.ndim != 2 or losses.ndim != 2 or len(candidates) != len(losses) or not losses.size:
        raise ValueError(f"need U [M, K] and losses [M, D], got {candidates.shape} and {losses.shape}")
    if len(names) != losses.shape[1]:
        raise ValueError(f"losses {losses.shape} have {losses.shape[1]} domains, but {len(names)} are named")
    bad = np.argwhere(~(np.isfinite(losses) & (losses > 0)))
    if bad.size:
        row, domain = bad[0]
        value = losses[row, domain]
        raise ValueError(f"loss of {names[domain]} in row {row} is {value}: it must be finite and above 0")
    return require_simplex(candidates, "each row of the candidates"), losses


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


def _leave_one_out(problems: robust.HuberProblems, theta: np.ndarray, *, short: bool) -> np.ndarray:
    """RMSE [D] of each point under the fit to all others, refitted from theta [D, 2 + r].

    short: whether the points that remain are fewer than the coefficients, so that the refit needs a ridge.
    """
    num_domains, points = problems.target.shape
    if points < 2:
        return np.full(num_domains, np.nan)
    left_out = np.arange(points)
    errors = np.empty((num_domains, points))
    per_pass = max(1, LEAVE_ONE_OUT_ELEMENTS // (points * num_domains))
    for chunk in np.array_split(left_out, -(-points // per_pass)):
        rows = np.repeat(np.arange(num_domains), len(chunk))
        column = np.tile(chunk, num_domains)
        part = problems.take(rows)
        part.weight[np.arange(len(rows)), column] = 0.0  # a copy: take() gathers
        part.ridge[:] = np.maximum(part.ridge, RIDGE * points * short)
        refitted, _ = robust.minimise(part, theta[rows])
        residual = robust.predict(refitted, problems.z) - part.target
        errors[:, chunk] = residual[np.arange(len(rows)), column].reshape(num_domains, -1)
    with np.errstate(over="ignore"):  # a law that explodes at the point left out: inf says so
        return np.sqrt((errors**2).mean(axis=1))


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
