"""Whole searches on known losses: do the intervals hold what they promise, and the decision too?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opmix_dist.search.bootstrap import bootstrap
from opmix_dist.search.decision import decide, predicted_gain
from opmix_dist.search.laws import Law, LogLinearLaw, Observations, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import propose
from opmix_dist.search.simplex import Components, sample_candidates

# Weights that a solver leaves within this of each other are the same.
SAME_WEIGHT = 1e-3


@dataclass(frozen=True)
class Bent:
    """A log-linear law and waves on it that no family has: bend sin(3 r_i . u)."""

    law: LogLinearLaw
    bend: float
    directions: np.ndarray

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        return self.law.predict(candidates) + self.bend * np.sin(3 * candidates @ self.directions.T)

    def gradient(self, u: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        waves = 3 * self.bend * np.cos(3 * self.directions @ u)
        return self.law.gradient(u) + waves[:, None] * self.directions


@dataclass(frozen=True)
class Case:
    """domains: their number, a probe for each and one for `old`; candidates: their number M; noise: standard
    deviation of a measured loss, nats; bend: size of what is not log-linear in the truth, nats.

    effect: how far losses fall along their own domain's probe; 0: no loss depends on the mixture.
    """

    domains: int
    candidates: int
    noise: float
    bend: float = 0.0
    effect: float = 0.35
    family: str = "log_linear"
    gradients: bool = False

    def problem(self, rng: np.random.Generator) -> Problem:
        """`old` is the prior too, so that staying has no KL."""
        old = 0.9 * rng.dirichlet(np.full(self.domains, 2.0)) + 0.1 / self.domains
        names = [f"d{i}" for i in range(self.domains)]
        return Problem(Components.for_rebalance(names, old).matrix, old, kl=0.05, domains=names, losses=names)

    def truth(self, rng: np.random.Generator) -> Law:
        """Losses of 2 to 4 nats that fall most along their own domain's probe, and vary along the others'."""
        shape = (self.domains, self.domains + 1)
        own = np.eye(*shape, k=1) * rng.uniform(0.3, 1.7, (self.domains, 1))
        t = self.effect * (0.4 * rng.standard_normal(shape) - own)
        law = LogLinearLaw(np.log(rng.uniform(1, 2.5, self.domains)), t)
        return Bent(law, self.bend, rng.standard_normal(shape)) if self.bend else law


@dataclass(frozen=True)
class Outcome:
    """Of one search. Each array is how far a truth lies from the middle of its interval of 90%, in half
    widths: of the weights [X], of those whose probe has a weight above 0, of the losses at 10 mixtures
    [10, X], of the losses at the probes [K, X].

    width: mean width of the weights' intervals; seconds: of the processor, for fit, proposal and
    bootstrap; moved: the decision;
    gain: the true one of the proposal over staying, nats.
    """

    weights: np.ndarray
    inner: np.ndarray
    mixtures: np.ndarray
    probes: np.ndarray
    width: float
    seconds: tuple[float, float, float]
    moved: bool
    gain: float


def search(case: Case, number: int, *, count: int = 100) -> Outcome:
    """A search on the truth of that number."""
    rng = np.random.default_rng([number, case.domains, case.candidates])
    problem, truth = case.problem(rng), case.truth(rng)
    components = case.domains + 1
    best = propose(truth, problem)
    candidates = sample_candidates(components, case.candidates, seed=number)
    losses = truth.predict(candidates)
    observations = Observations(
        candidates,
        losses + case.noise * rng.standard_normal(losses.shape),
        gradients=np.stack([truth.gradient(u) for u in candidates]) if case.gradients else None,
        composition=problem.composition,
        names=problem.losses,
    )
    keep = np.eye(components)[0]
    times = [time.process_time()]
    fit = fit_law(observations, family=case.family, seed=number)
    times.append(time.process_time())
    proposal = propose(fit.law, problem)
    times.append(time.process_time())
    spread = bootstrap(fit, problem, count=count, seed=number, keep=keep, proposal=proposal)
    times.append(time.process_time())
    gain = predicted_gain(fit.law, problem, spread, keep=keep, u=proposal.u)

    def distance(
        interval: tuple[np.ndarray, np.ndarray], value: np.ndarray, slack: float = 1e-9
    ) -> np.ndarray:
        low, high = interval
        return np.abs(value - (low + high) / 2) / ((high - low) / 2 + slack)

    mixtures = sample_candidates(components, 10, seed=number + 10_000)
    weights = distance(spread.interval(), best.mixture, SAME_WEIGHT)
    low, high = spread.interval()
    stay, move = truth.predict(np.stack([keep, proposal.u]))
    return Outcome(
        weights,
        weights[best.u[1:] > SAME_WEIGHT],
        distance(spread.predict_interval(mixtures), truth.predict(mixtures)),
        distance(spread.predict_interval(np.eye(components)), truth.predict(np.eye(components))),
        float((high - low).mean()),
        (times[1] - times[0], times[2] - times[1], times[3] - times[2]),
        decide(gain.value, gain.stderr).move,
        float(problem.value(stay) - problem.value(move)),
    )


def covered(outcomes: Sequence[Outcome], what: str, widened: float = 1.0) -> float:
    """Part of all intervals of a kind that hold the truth, were they wider by that factor."""
    distances: list[Any] = [getattr(outcome, what).ravel() for outcome in outcomes]
    return float((np.concatenate(distances) <= widened).mean())
