import dataclasses
from functools import cache

import numpy as np
import pytest

from opmix_dist.search import bootstrap as module
from opmix_dist.search.bootstrap import Bootstrap, bootstrap
from opmix_dist.search.laws import LogLinearLaw, Observations, fit_law
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import SolverError, propose
from opmix_dist.search.simplex import sample_candidates
from tests.search.coverage import Case, covered, search

TRUTH = LogLinearLaw(np.log([1.5, 2.0]), np.array([[-0.5, 0.1, 0.0], [0.0, -0.4, 0.2]]))
PROBLEM = Problem(np.eye(3), np.ones(3) / 3)
KEEP = np.ones(3) / 3


def fitted(noise, *, points=15, seed=0, family="log_linear", stderr=None):
    candidates = sample_candidates(3, points, seed=seed)
    losses = TRUTH.predict(candidates)
    losses = losses + noise * np.random.default_rng(seed).standard_normal(losses.shape)
    return fit_law(Observations(candidates, losses, stderr), family=family, seed=0)


def resampled(fit, **settings):
    return bootstrap(
        fit, PROBLEM, **{"count": 40, "seed": 0, "proposal": propose(fit.law, PROBLEM)} | settings
    )


@cache
def outcomes(case, count=12, resamples=40):
    return [search(case, number, count=resamples) for number in range(count)]


@pytest.mark.parametrize("what", ["weights", "mixtures", "probes"])
def test_nine_of_ten_intervals_hold_the_truth(what):
    # benchmarks/search_coverage.py measures it closely; here intervals that are off by a factor of 3 fail.
    found = outcomes(Case(domains=3, candidates=12, noise=0.005))
    assert 0.78 <= covered(found, what) <= 0.985
    assert covered(found, what, widened=1 / 3) < 0.6
    assert covered(found, what, widened=3) > 0.985


def test_no_loss_depends_on_the_mixture_so_staying_is_right():
    # One-sided 90%: one move in ten at most, of 8 more than 3 in one of 200 tests.
    found = outcomes(Case(domains=3, candidates=12, noise=0.005, effect=0.0), count=8, resamples=20)
    assert sum(outcome.moved for outcome in found) <= 3
    # Where mixtures do differ most searches move, and for the better.
    clear = outcomes(Case(domains=3, candidates=12, noise=0.005))
    assert sum(outcome.moved for outcome in clear) >= 6
    assert all(outcome.gain > 0 for outcome in clear if outcome.moved)


def test_without_noise_nothing_is_uncertain():
    fit = fitted(0.0)
    found = resampled(fit, keep=KEEP)
    low, high = found.interval()
    # What is left is the tolerance of the solver.
    assert (high - low).max() < 1e-3
    expected = PROBLEM.value(fit.law.predict(KEEP[None]))[0] - PROBLEM.value(
        propose(fit.law, PROBLEM).predicted
    )
    np.testing.assert_allclose(found.gains, expected, atol=1e-6)
    assert abs(found.optimism) < 1e-6


def test_intervals_grow_with_the_noise_and_surround_the_law():
    widths = []
    for noise in (0.001, 0.004):
        fit = fitted(noise)
        low, high = resampled(fit).predict_interval(KEEP[None])
        assert (low < fit.law.predict(KEEP[None])).all()
        assert (fit.law.predict(KEEP[None]) < high).all()
        widths.append((high - low).mean())
    assert 2.5 < widths[1] / widths[0] < 6


def test_the_same_seed_gives_the_same_bootstrap():
    fit = fitted(0.004)
    first, again, other = (resampled(fit, seed=seed).u for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (40, 3)
    np.testing.assert_allclose(first.sum(axis=1), 1)


def test_a_law_overrates_the_mixture_that_it_chose():
    flat = Observations(
        sample_candidates(3, 12, seed=0),
        2 + 0.01 * np.random.default_rng(0).standard_normal((12, 2)),
    )
    found = resampled(fit_law(flat, seed=0), keep=KEEP)
    assert found.optimism > 0


def test_noise_of_known_leverage_by_hand():
    # Residuals of 0.01 (1 - h) and of 0.01 left out, h = 3/4: the noise is 0.01 sqrt(1/4), and a quarter of
    # the 8 candidates is free. An infinite one counts as the range of the losses, nan as the one within.
    fit = fitted(0.001, points=8)
    inside, outside = np.full((8, 2), 0.0025), np.full((8, 2), 0.01)
    measured = np.linspace(2, 3, 8)[:, None] * np.ones(2)
    changed = dataclasses.replace(
        fit,
        observations=dataclasses.replace(fit.observations, losses=measured),
        predicted=measured + inside,
        left_out=measured + outside,
    )
    residual, freedom = module._noise(changed)
    np.testing.assert_allclose(residual, 0.005)
    np.testing.assert_allclose(freedom, 2)
    outside[0] = np.inf
    outside[1] = np.nan
    residual, _ = module._noise(dataclasses.replace(changed, left_out=measured + outside))
    np.testing.assert_allclose(residual[0], 0.3 * 1.0025)
    np.testing.assert_allclose(residual[1], 0.0025)


def test_standard_errors_say_which_candidates_are_noisy():
    stderr = np.ones((15, 2))
    stderr[:5] = 10.0
    size = module._relative_size(fitted(0.001, stderr=stderr * 1e-3).observations)
    np.testing.assert_allclose(size[0] / size[-1], 10)
    np.testing.assert_allclose((size**2).mean(axis=0), 1)
    assert (module._relative_size(fitted(0.001).observations) == 1).all()


def test_gradients_make_intervals_narrow():
    candidates = sample_candidates(3, 8, seed=0)
    losses = TRUTH.predict(candidates) + 0.004 * np.random.default_rng(0).standard_normal((8, 2))
    gradients = np.stack([TRUTH.gradient(u) for u in candidates])
    widths = []
    for slopes in (None, gradients):
        fit = fit_law(Observations(candidates, losses, gradients=slopes), seed=0)
        low, high = resampled(fit).interval()
        widths.append((high - low).mean())
    assert 0 < widths[1] < widths[0] / 3


@pytest.mark.parametrize("family", ["power", "quadratic", "gaussian_process"])
def test_every_family_has_intervals(family):
    fit = fitted(0.004, points=24, family=family)
    found = resampled(fit, count=5, keep=KEEP)
    low, high = found.interval()
    assert (low <= high).all()
    assert (high - low).max() > 1e-4
    assert len(found.laws) == len(found.gains) == 5


def test_a_bound_that_a_resampled_law_cannot_keep_leaves_the_nearest_mixture():
    fit = fitted(0.004)
    now = fit.law.predict(KEEP[None])[0]
    problem = dataclasses.replace(PROBLEM, reference=now, max_increase=np.zeros(2))
    found = bootstrap(fit, problem, count=40, seed=0, proposal=propose(fit.law, problem))
    assert len(found.laws) == 40
    assert np.isfinite(found.mixtures).all()


def test_laws_that_no_solver_answers_are_counted_and_too_many_are_an_error(monkeypatch):
    fit = fitted(0.004)
    calls = {"failing": 4, "made": 0}
    solve = module.Proposer.__call__

    def fail_first(self, law, **settings):
        calls["made"] += 1
        if calls["made"] <= calls["failing"]:
            raise SolverError("no optimum")
        return solve(self, law, **settings)

    proposal = propose(fit.law, PROBLEM)
    monkeypatch.setattr(module.Proposer, "__call__", fail_first)
    found = bootstrap(fit, PROBLEM, count=20, seed=0, proposal=proposal)
    assert found.failures == 4
    assert len(found.laws) == len(found.u) == 16
    calls |= {"failing": 5, "made": 0}
    with pytest.raises(SolverError, match="failed on 5 of 20 resampled laws"):
        bootstrap(fit, PROBLEM, count=20, seed=0, proposal=proposal)


def test_interval_is_of_quantiles_by_hand():
    mixtures = np.column_stack([np.linspace(0, 1, 101), np.linspace(1, 0, 101)])
    found = Bootstrap(laws=(), u=mixtures, mixtures=mixtures, gains=np.empty(0))
    low, high = found.interval(0.9)
    np.testing.assert_allclose(low, [0.05, 0.05])
    np.testing.assert_allclose(high, [0.95, 0.95])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 1"):
        found.interval(1)


def test_a_bootstrap_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        resampled(fitted(0.004), count=1)
