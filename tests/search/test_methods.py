"""Methods of search find the optimum of known losses, keep bounds and budgets, and go on where they were."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from opmix_dist.search.gradient_search import LocalModel, _updated
from opmix_dist.search.methods import GradientSearch, LawSearch, MixtureSearch
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import InfeasibleError, propose
from opmix_dist.search.simplex import sample_candidates, sobol_candidates
from tests.search.truths import PowerTruth, least_total, log_linear_truth, rebalance, run, total

D, K = 4, 5
OLD = np.eye(K)[0]
QUICK = {"num_starts": 16}


def regret(search: MixtureSearch, truth, **noise) -> float:
    result, _ = run(search, truth, **noise)
    return total(truth, search.problem, result.proposal.u) - least_total(truth, search.problem)


@pytest.mark.parametrize("seed", range(3))
def test_laws_find_the_optimum_of_log_linear_losses(seed: int) -> None:
    problem = rebalance(D)
    truth = log_linear_truth(problem, seed)
    staying = total(truth, problem, OLD) - least_total(truth, problem)
    assert staying > 1e-3, "nothing to find"
    assert regret(LawSearch(problem, sample_candidates(K, 12, seed=seed), seed=seed, **QUICK), truth) < 1e-6
    few = sobol_candidates(K, 3, seed=seed)  # 3 values and 3 gradients against 6 coefficients a law
    assert regret(LawSearch(problem, few, seed=seed, gradients=True, **QUICK), truth) < 1e-6


def test_refinement_finds_the_optimum_of_losses_that_are_in_no_family() -> None:
    """Measured, mean of 4 seeds: 8e-3 nats with 20 Sobol candidates, 3e-3 with 12 and 2 rounds of 4."""
    problem = rebalance(D)
    plain, refined = [], []
    for seed in range(4):
        truth = PowerTruth.draw(problem, seed)
        plain.append(
            regret(LawSearch(problem, sobol_candidates(K, 20, seed=seed), seed=seed, **QUICK), truth)
        )
        search = LawSearch(
            problem, sobol_candidates(K, 12, seed=seed), seed=seed, refine_rounds=2, refine_count=4, **QUICK
        )
        refined.append(regret(search, truth))
        assert len(search.observations.candidates) <= 20
    assert np.mean(refined) < 0.7 * np.mean(plain)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("start", [OLD, np.eye(K)[1], np.full(K, 1 / K)], ids=["old", "corner", "centre"])
def test_gradients_find_the_optimum_of_any_losses(seed: int, start: np.ndarray) -> None:
    problem = rebalance(D)
    for truth in (log_linear_truth(problem, seed), PowerTruth.draw(problem, seed)):
        search = GradientSearch(problem, start, max_evaluations=10)
        result, asked = run(search, truth)
        assert len(asked) <= 10
        assert total(truth, problem, result.proposal.u) - least_total(truth, problem) < 2e-4
        assert result.proposal.objective == pytest.approx(total(truth, problem, result.proposal.u), abs=1e-12)
        np.testing.assert_array_equal(asked[0], start)


def test_a_finer_tolerance_gets_closer() -> None:
    problem = rebalance(D)
    truth = PowerTruth.draw(problem, 0)
    search = GradientSearch(problem, OLD, max_evaluations=40, tolerance=1e-9)
    assert regret(search, truth) < 1e-7
    assert "no step promises" in search.result().why_ended


@pytest.mark.parametrize("objective", ["worst", "worst_change", "relative"])
def test_gradients_solve_every_objective(objective) -> None:
    """The program that is given the true laws is the reference."""
    truth = log_linear_truth(rebalance(D), 1)
    problem = rebalance(D, objective=objective, reference=truth.predict(OLD[None])[0], kl=0.01)
    start = np.eye(K)[1]
    expected = propose(truth, problem).objective
    result, _ = run(GradientSearch(problem, start, max_evaluations=20, tolerance=1e-6), truth)
    assert total(truth, problem, start) > expected + 1e-2
    assert result.proposal.objective == pytest.approx(expected, abs=1e-5)


def test_gradients_keep_bounds_on_losses_and_shares() -> None:
    plain = rebalance(D, kl=0.001)
    truth = log_linear_truth(plain, 1)
    free = propose(truth, plain)
    reference = truth.predict(OLD[None])[0]
    rise = free.predicted - reference
    problem = rebalance(
        D,
        kl=0.001,
        reference=reference,
        max_increase=np.where(rise > 0, rise / 2, np.inf),
        caps=np.where(free.mixture == free.mixture.max(), 0.9 * free.mixture, 1.0),
        floors=np.where(free.mixture == free.mixture.min(), 1.1 * free.mixture, 0.0),
    )
    assert len(problem.violations(free.predicted, free.u)) >= 3, "the bounds bind nothing"
    expected = propose(truth, problem)
    result, _ = run(GradientSearch(problem, OLD, max_evaluations=20, tolerance=1e-6), truth)
    losses = truth.predict(result.proposal.u[None])[0]
    assert problem.violations(losses, result.proposal.u, 2e-6) == []
    assert result.proposal.objective == pytest.approx(expected.objective, abs=1e-5)


def test_gradients_leave_a_start_that_bounds_or_the_prior_forbid() -> None:
    capped = rebalance(D, caps=np.array([0.2, 1.0, 1.0, 1.0]))  # `old` has 0.25
    truth = log_linear_truth(capped, 2)
    result, _ = run(GradientSearch(capped, OLD, tolerance=1e-6), truth)
    assert result.proposal.mixture[0] <= 0.2 + 1e-6
    assert result.proposal.objective == pytest.approx(propose(truth, capped).objective, abs=1e-5)
    prior = np.array([0.0, 0.5, 0.25, 0.25])
    pure = Problem(np.eye(D), prior)
    truth = log_linear_truth(pure, 2)
    result, _ = run(GradientSearch(pure, np.full(D, 0.25), tolerance=1e-6), truth)
    assert result.proposal.u[0] == 0
    assert result.proposal.objective == pytest.approx(propose(truth, pure).objective, abs=1e-5)


def test_bounds_that_cannot_be_kept_are_named() -> None:
    capped = rebalance(D, caps=np.full(D, 0.2))
    with pytest.raises(InfeasibleError, match="caps sum to 0.8"):
        run(GradientSearch(capped, OLD), log_linear_truth(capped, 0))
    capped = rebalance(D, caps=np.array([0.2, 1.0, 1.0, 1.0]))
    with pytest.raises(InfeasibleError, match=r"none of 1 evaluated .* cap of d0 \(0.2\) .* by 0.05"):
        run(GradientSearch(capped, OLD, max_evaluations=1), log_linear_truth(capped, 0))


def test_a_loss_that_is_not_convex_is_still_lowered() -> None:
    """Waves 10 times as high as above."""
    problem = rebalance(D)
    for seed in range(4):
        truth = PowerTruth.draw(problem, seed, wave=0.1)
        result, _ = run(GradientSearch(problem, np.full(K, 1 / K), max_evaluations=25), truth)
        end = result.proposal.u
        gain = total(truth, problem, np.full(K, 1 / K)) - result.proposal.objective
        assert gain > 5e-3
        slope = truth.gradient(end).mean(axis=0)  # no corner promises a first-order gain that is not small
        x = end @ problem.expanded
        slope = slope + problem.kl * problem.expanded @ np.log(x / problem.prior)
        assert (slope @ end - slope.min()) < 0.05


def searches(problem: Problem) -> list[MixtureSearch]:
    return [
        LawSearch(problem, sobol_candidates(K, 8, seed=0), seed=0, refine_rounds=2, refine_count=3, **QUICK),
        LawSearch(
            problem, sobol_candidates(K, 3, seed=0), seed=0, refine_rounds=2, gradients=True, refine_count=1,
            **QUICK,
        ),
        GradientSearch(problem, OLD, max_evaluations=4, tolerance=1e-9),
    ]  # fmt: skip


@pytest.mark.parametrize("which", range(3))
def test_the_same_tells_give_the_same_asks(which: int) -> None:
    """A search that was killed is told again what it knew and goes on to the same result."""
    problem = rebalance(D)
    truth = PowerTruth.draw(problem, 3)
    whole, again = searches(problem)[which], searches(problem)[which]
    result, asked = run(whole, truth, noise=0.002)
    told, row = whole.observations, 0
    while (candidates := again.ask()) is not None:
        rows = slice(row, row + len(candidates))
        np.testing.assert_array_equal(candidates, asked[rows])
        gradients = None if told.gradients is None else told.gradients[rows]
        again.tell(told.losses[rows], told.stderr[rows], gradients)
        row = rows.stop
    assert row == len(asked)
    assert len(asked) == [8 + 2 * 3, 3 + 2, 4][which]
    np.testing.assert_array_equal(again.result().proposal.u, result.proposal.u)
    assert again.result().why_ended == result.why_ended
    assert result.rounds == [3, 3, 4][which]


def test_refinement_evaluates_the_proposal_and_ends_when_it_is_stable() -> None:
    problem = rebalance(D)
    truth = log_linear_truth(problem, 0)
    start = sobol_candidates(K, 12, seed=0)
    plain = LawSearch(problem, start, seed=0, **QUICK)
    before, _ = run(plain, truth)
    search = LawSearch(problem, start, seed=0, refine_rounds=5, refine_count=3, **QUICK)
    result, asked = run(search, truth)
    np.testing.assert_allclose(asked[12], before.proposal.u, atol=1e-12)
    near = asked[13:15]
    assert (near >= before.proposal.u / 2 - 1e-12).all(), "half of a neighbour is the proposal"
    assert result.why_ended == "the proposal is stable after 1 rounds of refinement"
    assert len(asked) == 15
    assert before.why_ended == "all candidates are evaluated"
    assert before.fit is not None
    assert len(before.fit.measured) == 12


def test_order_and_shapes_are_enforced() -> None:
    problem = rebalance(D)
    truth = log_linear_truth(problem, 0)
    search = GradientSearch(problem, OLD, max_evaluations=2)
    losses, gradients = truth.predict(OLD[None]), truth.gradient(OLD)[None]
    with pytest.raises(ValueError, match="ask first"):
        search.tell(losses, None, gradients)
    for read in (search.result, lambda: search.observations):
        with pytest.raises(ValueError, match="nothing was told"):
            read()
    search.ask()
    with pytest.raises(ValueError, match="tell them first"):
        search.ask()
    with pytest.raises(ValueError, match="needs the gradients"):
        search.tell(losses)
    with pytest.raises(ValueError, match="needs the gradients"):
        search.tell(losses, None, gradients * np.nan)
    with pytest.raises(ValueError, match="loss of d2 in row 0 is nan"):
        search.tell(np.where(np.arange(D) == 2, np.nan, losses), None, gradients)
    with pytest.raises(ValueError, match="named"):
        search.tell(losses[:, :3], None, gradients[:, :3])
    search.tell(losses, None, gradients)
    u = search.ask()
    assert u is not None
    with pytest.raises(ValueError, match="standard errors"):
        search.tell(truth.predict(u), np.ones((1, D)), truth.gradient(u[0])[None])
    search.tell(truth.predict(u), None, truth.gradient(u[0])[None])
    assert search.ask() is None
    assert search.ask() is None
    with pytest.raises(ValueError, match="ask first"):
        search.tell(losses, None, gradients)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: LawSearch(p, np.eye(3), seed=0), r"candidates \[m, 5\]"),
        (lambda p: LawSearch(p, np.zeros((0, K)), seed=0), r"candidates \[m, 5\]"),
        (lambda p: LawSearch(p, np.ones((1, K)), seed=0), "sum to 1"),
        (lambda p: LawSearch(p, OLD[None], seed=0, refine_count=0), "refine_count"),
        (lambda p: GradientSearch(p, OLD, max_evaluations=0), "max_evaluations"),
        (lambda p: GradientSearch(p, OLD, tolerance=0.0), "tolerance"),
    ],
)
def test_wrong_settings_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(rebalance(D))


def test_local_models_agree_with_themselves() -> None:
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((2, 3, 3))
    model = LocalModel(
        np.array([0.2, 0.3, 0.5]), np.array([2.0, 3.0]), rng.standard_normal((2, 3)), roots @ roots.mT
    )
    np.testing.assert_array_equal(model.predict(model.point[None])[0], model.losses)
    u = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(model.expression(cp.Constant(u)).value, model.predict(u[None])[0], atol=1e-12)
    slopes = [approx_fprime(u, lambda v, i=i: model.predict(v[None])[0, i], 1e-6) for i in range(2)]
    np.testing.assert_allclose(model.gradient(u), slopes, atol=1e-4)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
def test_curvature_learns_a_step_and_stays_positive(seed: int, known: float) -> None:
    """With H s = y for convex steps: what the model then says of the step is what was seen."""
    rng = np.random.default_rng(seed)
    root, moved, turned = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal(4)
    before = known * root @ root.T
    after = _updated(before, moved, turned)
    scale = np.abs(after).max()
    assert np.linalg.eigvalsh(after).min() >= -1e-9 * scale
    if moved @ turned >= 0.2 * (moved @ before @ moved) and moved @ turned > 1e-6:
        np.testing.assert_allclose(after @ moved, turned, atol=1e-9 * max(scale, 1))
