"""How far the proposal and the predictions would have moved with other noise: the bootstrap of a search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opmix_dist.search.feasibility import InfeasibleError, SolverError
from opmix_dist.search.laws import Law, LawFit, Observations
from opmix_dist.search.laws.log_linear import LogLinear
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal, Proposer

# A resampled loss is at least this part of the loss that the law predicts: losses are above 0.
LEAST_PART = 0.05
# Laws that the solver may fail on, as a part of all. Noise bends a law steep now and then.
MOST_FAILURES = 0.2
# Residuals of candidates left out count with this part at least: where a law has nearly as many coefficients
# as candidates it passes through them, and its own residuals say nothing.
LEAST_OF_LEFT_OUT = 0.3
# Variance of the random weights of candidates. 1 is the Bayesian bootstrap, which is right for very many
# candidates: with 12 of them its intervals of 90% held 73% of the losses.
WEIGHT_VARIANCE = 2.0


@dataclass(frozen=True)
class Bootstrap:
    """What B laws say that were fitted to resampled losses.

    laws: B of them; u [B, K] and mixtures [B, X]: their proposals; gains: problem.value at staying minus at
    the search's own proposal [B], nats where the objective is in nats, empty where nobody asked;
    optimism: by how much a law overrates the gain of the proposal that it made itself, mean of the B;
    failures: laws on which the solver failed: they are left out of all of this.
    """

    laws: tuple[Law, ...]
    u: np.ndarray
    mixtures: np.ndarray
    gains: np.ndarray
    optimism: float = 0.0
    failures: int = 0

    def interval(self, confidence: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends [X] of an interval for the weight of each domain in the best mixture."""
        return _interval(self.mixtures, confidence)

    def predict_interval(
        self, candidates: np.ndarray, confidence: float = 0.9
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends [M, D] of an interval for the expected losses at candidates U [M, K], without
        the law's averaging term."""
        draws = np.stack([law.predict(candidates, averaging=False) for law in self.laws])
        return _interval(draws, confidence)


def bootstrap(
    fit: LawFit,
    problem: Problem,
    *,
    count: int = 100,
    seed: int,
    keep: np.ndarray | None = None,
    proposal: Proposal,
    sampled: np.ndarray | None = None,
) -> Bootstrap:
    """Laws and proposals of ``count`` sets of losses that might as well have been measured.

    Each set is the law's prediction plus residuals of randomly drawn candidates, the same candidate for all
    losses, with a random sign. Residuals are scaled to the size of the noise as ``_noise`` tells. Standard
    errors only say how residuals of candidates compare: their own size is that of the held-out samples, which
    all candidates share. How other samples would move all candidates' losses alike is in no residual:
    ``sampled`` tells it, and its deviations from what was measured are added.

    Where gradients were fitted the candidates are weighed at random instead, each loss with its gradient:
    residuals of a loss and of its gradient cannot be drawn apart.

    What the law gets wrong at all candidates alike, and beyond them, is in no residual: there intervals are
    too narrow (``benchmarks/search_coverage.py`` measures it), and only evaluating the proposal helps.

    Args:
        fit: the law of the search.
        keep: u [K] that stands for staying, for ``gains``.
        proposal: of ``fit.law``.
        sampled: losses at the candidates on sets of held-out samples that were drawn with replacement
            [S, M, D], taken in turn; None where each loss is a measurement of its own. Without effect where
            gradients were fitted, which would have to be drawn with them.

    Raises:
        ValueError: count below 2.
        SolverError: the solver failed on more than a fifth of the laws.
    """
    if count < 2:
        raise ValueError(f"a bootstrap needs a count of at least 2, got {count}")
    rng = np.random.default_rng([seed, count])
    losses, weights = _resampled(fit, count, rng, sampled)
    laws, u = _refitted(fit, problem, losses, weights, proposal.u, seed)
    gains, optimism = np.empty(0), 0.0
    if keep is not None:
        gains = np.array([_gain(problem, law, keep, proposal.u) for law in laws])
        optimism = _optimism(problem, fit.law, laws, u, keep)
    return Bootstrap(tuple(laws), u, u @ problem.expanded, gains, optimism, count - len(laws))


def optimism_on_samples(
    fit: LawFit, problem: Problem, losses: np.ndarray, *, keep: np.ndarray, proposal: Proposal, seed: int
) -> float:
    """By how much a proposal's gain is overrated on the held-out samples that it was made on, at least 0.

    Of all mixtures a search proposes the one that these very samples like best, so that even where none is
    better it measures a gain above 0. Laws of resampled samples make proposals, whose gains on the samples
    that made them are compared with those on the search's own, which stand for all samples (Efron, 1983, doi
    10.1080/01621459.1983.10477973).

    Args:
        fit: the law of the search, without gradients: those would have to be resampled, too.
        losses: at the candidates of ``fit``, on B sets of samples drawn with replacement [B, M, D].
        keep: u [K] that stands for staying; proposal: of ``fit.law``.

    Raises:
        SolverError: the solver failed on more than a fifth of the laws.
    """
    laws, u = _refitted(fit, problem, losses, np.ones(losses.shape[:2]), proposal.u, seed)
    return max(_optimism(problem, fit.law, laws, u, keep), 0.0)


def _refitted(
    fit: LawFit, problem: Problem, losses: np.ndarray, weights: np.ndarray, start: np.ndarray, seed: int
) -> tuple[list[Law], np.ndarray]:
    """Laws of B sets of losses [B, M, D], without those the solver fails on, and their proposals [B, K]."""
    laws = fit.fitter.fit_many(fit.observations, losses, weights, fit.law, seed=seed)
    proposer = Proposer(problem, fit.law)
    kept, found = [], []
    for law in laws:
        try:
            found.append(proposer(law, seed=seed, start=start).u)
        except InfeasibleError as error:
            found.append(error.closest)  # under this law the bounds rule all out: as near as it gets
        except SolverError:
            continue
        kept.append(law)
    failures = len(laws) - len(kept)
    if failures > MOST_FAILURES * len(laws):
        raise SolverError(f"the solver failed on {failures} of {len(laws)} resampled laws")
    return kept, np.array(found)


def _optimism(problem: Problem, law: Law, laws: list[Law], u: np.ndarray, keep: np.ndarray) -> float:
    """By how much the laws rate their own proposals u [B, K] above what ``law`` says of these, on average."""
    own = [_gain(problem, one, keep, point) for one, point in zip(laws, u, strict=True)]
    return float(np.mean(own) - np.mean([_gain(problem, law, keep, point) for point in u]))


def _resampled(
    fit: LawFit, count: int, rng: np.random.Generator, sampled: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [count, M, D] and weights of candidates [count, M]."""
    measured = fit.measured
    points, num_losses = measured.shape
    if fit.observations.gradients is not None and isinstance(fit.fitter, LogLinear):
        weights = rng.gamma(1 / WEIGHT_VARIANCE, size=(count, points))
        return np.broadcast_to(measured, (count, *measured.shape)), weights / weights.mean(1, keepdims=True)
    residual, freedom = _noise(fit)
    size = _relative_size(fit.observations)
    drawn = (residual / size)[rng.integers(points, size=(count, points))]
    drawn *= rng.choice([-1.0, 1.0], size=(count, points, 1))
    # The size of the noise is itself known from few residuals: this makes of a normal interval Student's.
    drawn *= np.sqrt(freedom / rng.chisquare(freedom, size=(count, 1, num_losses)))
    found = fit.predicted + drawn * size
    if sampled is not None:
        found += sampled[np.arange(count) % len(sampled)] - measured
    floor = LEAST_PART * np.minimum(fit.predicted, measured)
    return np.maximum(found, floor), np.ones((count, points))


def _noise(fit: LawFit) -> tuple[np.ndarray, np.ndarray]:
    """Residuals [M, D] of the size of the noise, and the degrees of freedom that they leave [D].

    Residuals e of the fit are smaller than the noise, those of candidates left out, e', are larger. In linear
    regression e = (1 - h) e' for a candidate of leverage h, and e has (1 - h) of the noise's variance: so
    sqrt(e e') has all of it, and sum e^2 / mean(e e') is the number of degrees of freedom. Errors of a law
    that does not hold are in e' as well, and widen the intervals as noise does. An e' that is infinite (a law
    that explodes at the candidate left out) is taken for the range of the losses.
    """
    inside, outside = fit.predicted - fit.measured, fit.left_out - fit.measured
    spread = np.ptp(fit.measured, axis=0) + np.abs(inside).max(axis=0)
    outside = np.where(np.isnan(outside), inside, np.clip(outside, -spread, spread))
    outside = np.where(np.abs(outside) < np.abs(inside), inside, outside)
    size = np.maximum(np.sqrt(np.abs(inside * outside)), LEAST_OF_LEFT_OUT * np.abs(outside))
    square = (size**2).mean(axis=0)
    freedom = np.divide((inside**2).sum(axis=0), square, out=np.ones_like(square), where=square > 0)
    return np.sign(inside) * size, np.clip(freedom, 1.0, None)


def _relative_size(observations: Observations) -> np.ndarray:
    """Standard errors [M, D] relative to those of the loss's other candidates; 1 where none are known."""
    stderr = observations.stderr
    if stderr is None:
        return np.ones_like(observations.losses)
    mean = np.sqrt((stderr**2).mean(axis=0))
    return np.where(mean > 0, np.maximum(stderr, 0.1 * mean) / np.where(mean > 0, mean, 1), 1.0)


def _gain(problem: Problem, law: Law, keep: np.ndarray, u: np.ndarray) -> float:
    values = problem.value(law.predict(np.stack([keep, u]), averaging=False))
    return float(values[0] - values[1])


def _interval(draws: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
