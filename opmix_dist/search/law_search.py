"""Search by laws: fit them to candidates, propose, and look again where the proposal landed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opmix_dist.search.ask_tell import MixtureSearch, SearchResult
from opmix_dist.search.laws import LawFit, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal, propose
from opmix_dist.search.simplex import candidates_near

FIRST_SPREAD = 0.5
"""How far the neighbours of the first round are spread: half proposal, half a draw; each round halves it."""


class LawSearch(MixtureSearch):
    """Evaluates the candidates given, fits laws and solves for the proposal: OP-Mix (arXiv 2605.15220).

    Then ``refine_rounds`` times, beyond the paper: the proposal and ``refine_count - 1`` mixtures near it are
    evaluated and the laws are fitted again to everything, so that they are right where it matters. It ends
    early once a round moves no share of x by more than ``tolerance`` and the objective that was measured at
    the proposals falls by no more than ``gain_tolerance`` nats: more rounds would chase noise.

    The answer is the proposal of the last laws.

    candidates: U [M, K]. gradients: the laws are fitted to exact gradients, too, which every tell must bring.
    family, huber_delta, num_starts, averaging: of ``fit_law``.
    """

    def __init__(
        self,
        problem: Problem,
        candidates: np.ndarray,
        *,
        seed: int,
        family: str = "log_linear",
        gradients: bool = False,
        refine_rounds: int = 0,
        refine_count: int = 4,
        tolerance: float = 0.01,
        gain_tolerance: float = 1e-4,
        huber_delta: float = 0.02,
        num_starts: int = 64,
        averaging: bool = False,
        components: Sequence[str] = (),
    ) -> None:
        super().__init__(problem, np.asarray(candidates), wants_gradients=gradients, components=components)
        if refine_rounds < 0 or refine_count < 1:
            raise ValueError(
                f"need refine_rounds >= 0 and refine_count >= 1, got {refine_rounds}, {refine_count}"
            )
        self._seed, self._family = seed, family
        self._refine_rounds, self._refine_count = refine_rounds, refine_count
        self._tolerance, self._gain_tolerance = tolerance, gain_tolerance
        self._huber_delta, self._num_starts, self._averaging = huber_delta, num_starts, averaging
        self._fit: LawFit | None = None
        self._proposals: list[Proposal] = []  # of each fit; all but the last were evaluated
        self._why_ended = "more candidates wait for their losses"

    def _decide(self) -> np.ndarray | None:
        self._fit = fit_law(
            self.observations,
            family=self._family,
            seed=self._seed,
            huber_delta=self._huber_delta,
            num_starts=self._num_starts,
            averaging=self._averaging,
        )
        self._proposals.append(propose(self._fit.law, self.problem, seed=self._seed))
        done = self.rounds - 1  # rounds of refinement
        if self._refine_rounds == 0:
            self._why_ended = "all candidates are evaluated"
        elif self._is_stable():
            self._why_ended = f"the proposal is stable after {done} rounds of refinement"
        elif done == self._refine_rounds:
            self._why_ended = f"all {done} rounds of refinement are done"
        else:
            return self._around(self._proposals[-1].u, done)
        return None

    def _is_stable(self) -> bool:
        if len(self._proposals) < 2:
            return False
        before, now = self._proposals[-2:]
        if np.abs(now.mixture - before.mixture).max() > self._tolerance:
            return False
        measured = [self.problem.total(told.losses[0], told.candidates[0]) for told in self._told[1:]]
        return len(measured) < 2 or min(measured[:-1]) - measured[-1] <= self._gain_tolerance

    def _around(self, u: np.ndarray, done: int) -> np.ndarray:
        """The proposal u [K] and its neighbours: U [refine_count, K]."""
        if self._refine_count == 1:
            return u[None]
        near = candidates_near(
            u,
            self._refine_count - 1,
            spread=FIRST_SPREAD / 2**done,
            seed=int(np.random.default_rng([self._seed, done]).integers(2**63)),
        )
        return np.vstack([u, near])

    def _result(self) -> SearchResult:
        return SearchResult(self._fit, self._proposals[-1], self.rounds, self._why_ended)
