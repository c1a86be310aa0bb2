"""Searches by gradients that begin where a loss passes its bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.methods import GradientSearch
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import InfeasibleError, propose
from opmix_dist.search.simplex import Components
from tests.search.truths import run

DOMAINS = ("a", "b", "c")


def steep(seed: int, **settings: Any) -> tuple[LogLinearLaw, Problem]:
    """Each loss falls with its own domain; none may rise by more than 0.02 above `old`."""
    rng = np.random.default_rng(seed)
    old = np.full(3, 1 / 3)
    composition = Components.for_rebalance(DOMAINS, old).matrix
    t = -np.diag(rng.uniform(0.5, 2, 3))
    law = LogLinearLaw(np.log(rng.uniform(1, 2, 3)), t @ composition.T)
    bounds = {"reference": law.predict(np.eye(4)[:1])[0], "max_increase": np.full(3, 0.02)} | settings
    return law, Problem(composition, old, kl=0.01, domains=DOMAINS, losses=DOMAINS, **bounds)


@pytest.mark.parametrize("seed", [1, 4, 7, 9])  # of 9 the solver needs room, too
def test_it_comes_back_within_the_bounds_of_losses(seed: int) -> None:
    law, problem = steep(seed)
    start = np.eye(4)[1]
    assert problem.violations(law.predict(start[None])[0], start)
    result, _ = run(GradientSearch(problem, start, tolerance=1e-5), law)
    assert problem.violations(law.predict(result.proposal.u[None])[0], result.proposal.u, 1e-5) == []
    assert result.proposal.objective == pytest.approx(propose(law, problem).objective, abs=1e-4)


def test_bounds_that_nothing_keeps_are_named_where_they_fail_least() -> None:
    law, _ = steep(0)
    lowest = law.predict(np.eye(4)[:1])[0] - 0.5
    _, problem = steep(0, reference=lowest, max_increase=np.zeros(3))
    with pytest.raises(InfeasibleError, match=r"none of \d+ evaluated .* max_increase allows 0"):
        run(GradientSearch(problem, np.eye(4)[1]), law)
