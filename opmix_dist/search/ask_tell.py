"""What every method of search has in common: it asks for losses of candidates, and is told them.

    search = LawSearch(problem, candidates, seed=0)
    while (U := search.ask()) is not None:
        search.tell(*evaluate(U))
    search.result().proposal

The caller evaluates, alone or divided over ranks, and may keep what it told: the same tells lead to the same
asks, so that a search that was killed goes on by being told again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opmix_dist.search.laws import LawFit, Observations
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal
from opmix_dist.search.simplex import require_simplex


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    fit: the last law, None of a search without laws. proposal: where it proposes to go; its ``predicted`` are
    the law's losses, or the measured ones where the proposal is a point that was evaluated. rounds: how many
    asks were told. why_ended: in words, for the user.
    """

    fit: LawFit | None
    proposal: Proposal
    rounds: int
    why_ended: str


class MixtureSearch(ABC):
    """Guards the order of asks and tells, and keeps what was told; a method decides what comes next.

    wants_gradients: whether every tell must bring gradients. components: K names for messages.
    """

    def __init__(
        self, problem: Problem, first: np.ndarray, *, wants_gradients: bool, components: Sequence[str] = ()
    ) -> None:
        """``first``: U [m, K], what is asked first. ValueError unless its rows are on the simplex of K."""
        num_components = len(problem.composition)
        if first.ndim != 2 or first.shape[1] != num_components or not len(first):
            raise ValueError(f"need candidates [m, {num_components}] to begin with, got {first.shape}")
        self.problem, self.wants_gradients = problem, wants_gradients
        self._components = tuple(components)
        self._next: np.ndarray | None = require_simplex(first, "each candidate")
        self._is_asked = False
        self._told: list[Observations] = []

    def ask(self) -> np.ndarray | None:
        """U [m, K] to evaluate next, None when the search is done. ValueError while an ask has no tell."""
        if self._is_asked:
            raise ValueError("the candidates that were asked last have no losses yet: tell them first")
        self._is_asked = self._next is not None
        return None if self._next is None else self._next.copy()

    def tell(
        self, losses: np.ndarray, stderr: np.ndarray | None = None, gradients: np.ndarray | None = None
    ) -> None:
        """Losses [m, D] of the rows of the last ask, their standard errors [m, D] and gradients [m, D, K].

        Raises:
            ValueError: nothing was asked, shapes or values are wrong, gradients are wanted and missing, or
                standard errors are there in some tells only.
            InfeasibleError, SolverError: of the proposal that follows.
        """
        if not self._is_asked or self._next is None:
            raise ValueError("no candidates wait for losses: ask first")
        if self.wants_gradients and (gradients is None or not np.isfinite(gradients).all()):
            raise ValueError("this search needs the gradients of every candidate, finite")
        if self._told and (stderr is None) != (self._told[0].stderr is None):
            raise ValueError("standard errors must be told with all losses or with none")
        told = Observations(
            self._next,
            losses,
            stderr,
            gradients,
            self.problem.composition,
            self.problem.losses,
            self._components,
            self.problem.domains,
        )
        self.problem.require_losses(told.losses.shape[1])
        self._told.append(told)
        self._is_asked = False
        self._next = self._decide()

    @property
    def rounds(self) -> int:
        """How many asks were told."""
        return len(self._told)

    @property
    def observations(self) -> Observations:
        """Everything told so far, in order. ValueError before the first tell."""
        if not self._told:
            raise ValueError("nothing was told to this search yet")
        return joined(self._told)

    def result(self) -> SearchResult:
        """What was found so far; of a search that is not done, as if its budget ended here."""
        if not self._told:
            raise ValueError("nothing was told to this search yet")
        return self._result()

    @abstractmethod
    def _decide(self) -> np.ndarray | None:
        """What to ask next, after a tell."""

    @abstractmethod
    def _result(self) -> SearchResult:
        """After at least one tell."""


def joined(parts: Sequence[Observations]) -> Observations:
    """Observations of one search, one behind the other; nan where a row has no gradients and others have."""
    first = parts[0]
    stderr = gradients = None
    if first.stderr is not None:
        stderr = np.concatenate([part.stderr for part in parts if part.stderr is not None])
    if any(part.gradients is not None for part in parts):
        gradients = np.concatenate([_gradients(part) for part in parts])
    return Observations(
        np.concatenate([part.candidates for part in parts]),
        np.concatenate([part.losses for part in parts]),
        stderr,
        gradients,
        first.composition,
        first.names,
        first.components,
        first.domains,
    )


def _gradients(part: Observations) -> np.ndarray:
    if part.gradients is not None:
        return part.gradients
    return np.full((*part.losses.shape, part.candidates.shape[1]), np.nan)


def best_measured(problem: Problem, observations: Observations, tolerance: float) -> int | None:
    """Row of the lowest objective of those that keep all bounds to within the tolerance; None: none does."""
    losses, candidates = observations.losses, observations.candidates
    feasible = problem.excesses(losses, candidates).max(axis=1) <= tolerance
    if not feasible.any():
        return None
    return int(np.where(feasible, problem.totals(losses, candidates), np.inf).argmin())
