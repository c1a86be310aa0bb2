import numpy as np

from opmix_dist.search.laws import LogLinearLaw, Observations, fit_law
from opmix_dist.search.laws.power import PowerLaw
from opmix_dist.search.simplex import sample_candidates


def choose(candidates, losses, **settings):
    return fit_law(Observations(candidates, losses, **settings), family="auto", seed=0)


def test_the_log_linear_law_is_kept_where_it_is_true():
    rng = np.random.default_rng(0)
    for seed in range(5):
        candidates = sample_candidates(4, 16, seed=seed)
        law = LogLinearLaw(np.log([1.5, 2.0]), rng.normal(0, 0.3, (2, 4)))
        fit = choose(candidates, law.predict(candidates) + 5e-3 * rng.normal(size=(16, 2)))
        assert fit.family == "log_linear"


def test_another_family_is_taken_where_it_is_better_beyond_doubt():
    law = PowerLaw(
        np.log([1.5, 2.0, 1.0]), np.log([0.3, 0.1, 0.2]), np.diag([0.5, 0.7, 1.0]), np.full(3, 1e-2)
    )
    candidates = sample_candidates(3, 20, seed=0, alpha=0.5)
    names = ["a", "b", "c"]
    fit = choose(candidates, law.predict(candidates), names=names, components=names)
    assert fit.family == "power"
    assert (fit.comparison["power"] < 0.1 * fit.comparison["log_linear"]).all()


def test_errors_are_those_of_each_family_alone_and_absent_families_are_named():
    rng = np.random.default_rng(0)
    candidates = sample_candidates(3, 12, seed=0)
    losses = 2 + candidates[:, :2] + 0.01 * rng.normal(size=(12, 2))
    fit = choose(candidates, losses)
    assert list(fit.comparison) == ["log_linear", "power", "quadratic"]
    for family, error in fit.comparison.items():
        alone = fit_law(Observations(candidates, losses), family=family, seed=0)
        np.testing.assert_allclose(error, alone.loo_error)
    assert "12 candidates are too few for laws of trees, gaussian_process" in fit.warnings[0]


def test_large_swarms_compare_all_families():
    candidates = sample_candidates(3, 120, seed=0, alpha=0.5)
    losses = 2 + 0.5 * (candidates[:, :1] > 0.4) + 0.3 * (candidates[:, 1:2] > 0.3)
    fit = choose(candidates, losses)
    assert set(fit.comparison) == {"log_linear", "power", "quadratic", "trees", "gaussian_process"}
    assert fit.family in ("trees", "gaussian_process")


def test_a_loss_that_is_constant_but_for_rounding_has_no_say():
    rng = np.random.default_rng(6)
    candidates = rng.dirichlet(np.ones(3), 30)
    losses = 2 + np.exp(-candidates @ np.array([[1, 0.3, 0], [0.3, 1, 0]]).T)
    losses += 0.002 * rng.standard_normal((30, 2))
    constant = 2.5 * (1 + 2e-16 * rng.integers(-2, 3, (30, 1)))
    assert choose(candidates, losses).family == "log_linear"
    assert choose(candidates, np.hstack([losses, constant])).family == "log_linear"
