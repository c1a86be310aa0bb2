import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from opmix_dist.search.laws import LogLinearLaw, Observations, fit_law, robust
from opmix_dist.search.simplex import sample_candidates

DELTA = 0.02


def random_law(rng, num_domains, num_components, spread):
    t = rng.normal(0, spread, (num_domains, num_components))
    return LogLinearLaw(rng.normal(0.5, 0.3, num_domains), t)


def fit_log_linear(candidates, losses, *, domains=(), **settings):
    return fit_law(Observations(candidates, losses, names=domains), **settings)


def objective(fit):
    residual = np.abs(fit.predicted - fit.measured)
    return np.where(residual <= DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2)).sum(axis=0)


def test_prediction_by_hand():
    law = LogLinearLaw(np.log([2.0, 1.0]), np.array([[0.0, np.log(4)], [np.log(9), 0.0]]))
    np.testing.assert_allclose(law.predict(np.array([[1.0, 0.0], [0.5, 0.5]])), [[3, 10], [4, 4]])


def test_gradient_agrees_with_finite_differences():
    rng = np.random.default_rng(0)
    law, u = random_law(rng, 3, 4, 1.0), rng.dirichlet(np.ones(4))
    steps = 1e-6 * np.eye(4)
    numeric = (law.predict(u + steps) - law.predict(u - steps)).T / 2e-6
    np.testing.assert_allclose(law.gradient(u), numeric, rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 1.5]))
def test_known_laws_are_recovered_from_noiseless_losses(num_components, seed, spread):
    rng = np.random.default_rng(seed)
    law = random_law(rng, 4, num_components, spread)
    candidates = sample_candidates(num_components, 4 * num_components + 4, seed=seed)
    fit = fit_log_linear(candidates, law.predict(candidates), seed=1)
    elsewhere = sample_candidates(num_components, 20, seed=seed + 1)
    np.testing.assert_allclose(fit.law.predict(elsewhere), law.predict(elsewhere), atol=1e-6)
    assert (fit.loo_error < 1e-6).all()


def test_coefficients_are_recovered_where_the_curvature_shows_them():
    rng = np.random.default_rng(2)
    law = random_law(rng, 5, 4, 1.0)
    candidates = sample_candidates(4, 20, seed=0)
    fit = fit_log_linear(candidates, law.predict(candidates), seed=0)
    np.testing.assert_allclose(fit.law.log_c, law.log_c, atol=1e-8)
    np.testing.assert_allclose(fit.law.t, law.t, atol=1e-8)
    np.testing.assert_allclose(fit.r2, 1, atol=1e-12)
    np.testing.assert_allclose(fit.spearman, 1)
    assert fit.warnings == ()


def test_outliers_move_the_huber_fit_little():
    rng = np.random.default_rng(5)
    law = random_law(rng, 1, 3, 0.7)
    candidates = sample_candidates(3, 40, seed=0)
    losses = law.predict(candidates)
    losses[[3, 17, 30]] += 1.0
    fit = fit_log_linear(candidates, losses, seed=0)
    clean = np.delete(np.arange(40), [3, 17, 30])
    assert np.abs(fit.predicted - law.predict(candidates))[clean].max() < 0.02
    assert objective(fit)[0] == pytest.approx(3 * DELTA * (1 - DELTA / 2), rel=0.1)


def test_leave_one_out_equals_fits_without_each_candidate():
    rng = np.random.default_rng(11)
    law = random_law(rng, 2, 3, 1.0)
    candidates = sample_candidates(3, 14, seed=2)
    losses = law.predict(candidates) + 1e-3 * rng.normal(size=(14, 2))
    fit = fit_log_linear(candidates, losses, seed=0)
    errors = []
    for m in range(14):
        others = np.delete(np.arange(14), m)
        without = fit_log_linear(candidates[others], losses[others], seed=0)
        errors.append(without.law.predict(candidates[m : m + 1])[0] - losses[m])
    np.testing.assert_allclose(fit.loo_error, np.sqrt(np.mean(np.square(errors), axis=0)), rtol=1e-3)


def test_a_domain_is_fitted_alike_whatever_its_neighbours():
    rng = np.random.default_rng(4)
    law = random_law(rng, 3, 4, 0.5)
    candidates = sample_candidates(4, 16, seed=0)
    losses = law.predict(candidates) + 5e-3 * rng.normal(size=(16, 3))
    together = fit_log_linear(candidates, losses, seed=0)
    alone = fit_log_linear(candidates, losses[:, 1:2], seed=0)
    np.testing.assert_allclose(alone.law.t[0], together.law.t[1], rtol=1e-6)


def test_diagnostics_are_undefined_for_a_flat_domain_only():
    candidates = sample_candidates(2, 9, seed=0)
    fit = fit_log_linear(candidates, np.column_stack([np.full(9, 2.0), 2 + candidates[:, 0]]), seed=0)
    assert np.isnan(fit.r2[0])
    assert np.isnan(fit.spearman[0])
    residual, total = fit.measured - fit.predicted, fit.measured - fit.measured.mean(axis=0)
    assert fit.r2[1] == pytest.approx(1 - (residual[:, 1] ** 2).sum() / (total[:, 1] ** 2).sum())
    assert fit.spearman[1] == pytest.approx(1)


def test_spearman_is_that_of_scipy():
    rng = np.random.default_rng(8)
    candidates = sample_candidates(3, 20, seed=0)
    losses = random_law(rng, 3, 3, 0.5).predict(candidates) + rng.normal(0, 0.1, (20, 3)).round(1)
    fit = fit_log_linear(candidates, losses, seed=0)
    expected = [spearmanr(fit.measured[:, i], fit.predicted[:, i]).statistic for i in range(3)]
    np.testing.assert_allclose(fit.spearman, expected, atol=1e-12)


def test_a_single_component_has_flat_laws():
    losses = 2 + 1e-3 * np.arange(5.0)[:, None] * [1, 0]
    fit = fit_log_linear(np.ones((5, 1)), losses, seed=0)
    np.testing.assert_allclose(fit.predicted[0], [2.002, 2.0], atol=1e-9)
    assert np.isnan(fit.r2[1])


def test_constant_losses_give_a_flat_law_and_a_warning():
    candidates = sample_candidates(3, 12, seed=0)
    losses = np.column_stack([np.full(12, 3.25), 2 + candidates[:, 0]])
    fit = fit_log_linear(candidates, losses, seed=0, domains=["web", "code"])
    np.testing.assert_allclose(fit.law.predict(np.eye(3))[:, 0], 3.25, atol=1e-9)
    assert [w for w in fit.warnings if w.startswith("web: the loss is the same")]
    assert not [w for w in fit.warnings if w.startswith("code: the loss")]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_too_few_candidates_fit_the_data_with_a_warning(count):
    rng = np.random.default_rng(count)
    law = random_law(rng, 2, 7, 0.3)
    candidates = sample_candidates(7, count, seed=0)
    losses = law.predict(candidates)
    fit = fit_log_linear(candidates, losses, seed=0)
    np.testing.assert_allclose(fit.predicted, losses, atol=1e-4)
    assert np.ptp(fit.law.predict(np.eye(7)), axis=0).max() < 2 * np.ptp(law.predict(np.eye(7)), axis=0).max()
    assert "do not determine" in fit.warnings[0]
    assert np.isnan(fit.loo_error).all() == (count == 1)


def test_a_component_that_no_candidate_contains_is_warned_about():
    candidates = np.column_stack([sample_candidates(2, 12, seed=0), np.zeros(12)])
    fit = fit_law(Observations(candidates, 2 + candidates[:, :1], components=["a", "b", "c"]), seed=0)
    assert "do not determine" in fit.warnings[0]
    assert "all of them have the same of c" in fit.warnings[0]
    assert np.isfinite(fit.law.predict(np.eye(3))).all()


def test_a_steep_law_is_warned_about():
    law = LogLinearLaw(np.zeros(2), np.array([[0.0, 0.5, -0.5], [0.0, 3.0, -9.0]]))
    candidates = sample_candidates(3, 20, seed=0)
    fit = fit_log_linear(candidates, law.predict(candidates), seed=0, domains=["web", "code"])
    assert [w.split(":")[0] for w in fit.warnings] == ["code"]
    assert "too steep" in fit.warnings[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_a_bad_loss_is_named_by_row_and_domain(bad):
    losses = np.full((5, 3), 2.0)
    losses[3, 1] = bad
    with pytest.raises(ValueError, match="loss of code in row 3"):
        fit_log_linear(sample_candidates(2, 5, seed=0), losses, seed=0, domains=["web", "code", "math"])


def test_shapes_and_candidates_are_checked():
    good = sample_candidates(2, 5, seed=0)
    with pytest.raises(ValueError, match="losses"):
        fit_log_linear(good, np.ones((4, 2)), seed=0)
    with pytest.raises(ValueError, match="sum to 1"):
        fit_log_linear(2 * good, np.ones((5, 2)), seed=0)
    with pytest.raises(ValueError, match="named"):
        fit_log_linear(good, np.ones((5, 2)), seed=0, domains=["web"])
    with pytest.raises(ValueError, match="huber_delta"):
        fit_log_linear(good, np.ones((5, 2)), seed=0, huber_delta=0.0)


def test_coordinates_of_the_solver_invert_and_its_equations_are_derivatives():
    rng = np.random.default_rng(6)
    z = rng.normal(size=(15, 3))
    constant, log_amplitude = rng.uniform(1, 2, 4), rng.normal(size=4)
    exponents = rng.normal(0, 0.5, (4, 3))
    theta = robust.encode(constant, log_amplitude, exponents)
    log_c, back, v = robust.decode(theta, 3)
    np.testing.assert_allclose(np.exp(log_c), constant)
    np.testing.assert_allclose(back, log_amplitude, atol=1e-12)
    np.testing.assert_allclose(v, exponents)
    expected = constant[:, None] + np.exp(log_amplitude[:, None] + exponents @ z.T)
    np.testing.assert_allclose(robust.predict(theta, z), expected)

    target = expected + rng.normal(0, 0.05, expected.shape)
    problems = robust.HuberProblems(z, target, np.ones_like(target), np.zeros((4, 4)), DELTA)
    _, gradient = problems.normal_equations(theta)
    for k in range(5):
        step = np.zeros_like(theta)
        step[:, k] = 1e-6
        numeric = (problems.huber(theta + step) - problems.huber(theta - step)) / 2e-6
        np.testing.assert_allclose(gradient[:, k], numeric, rtol=1e-5, atol=1e-7)


def tangential(law, candidates):
    """Gradients [M, D, K] as a simulation gives them."""
    return np.array([law.gradient(u) for u in candidates])


def test_two_points_with_gradients_recover_what_values_alone_cannot():
    rng = np.random.default_rng(3)
    law = LogLinearLaw(np.log(rng.uniform(1, 2, 4)), rng.normal(0, 1.0, (4, 6)))
    candidates, elsewhere = sample_candidates(6, 2, seed=0), sample_candidates(6, 30, seed=1)
    losses = law.predict(candidates)
    with_slopes = fit_law(Observations(candidates, losses, gradients=tangential(law, candidates)), seed=0)
    np.testing.assert_allclose(with_slopes.law.predict(elsewhere), law.predict(elsewhere), atol=1e-6)
    np.testing.assert_allclose(with_slopes.law.t, law.t, atol=1e-5)
    assert with_slopes.warnings == ()
    values = fit_law(Observations(candidates, losses), seed=0)
    assert np.abs(values.law.predict(elsewhere) - law.predict(elsewhere)).max() > 0.1
    assert "do not determine" in values.warnings[0]


def test_only_differences_between_the_components_of_a_gradient_matter():
    law = random_law(np.random.default_rng(3), 2, 4, 1.0)
    candidates = sample_candidates(4, 5, seed=0)
    gradients = tangential(law, candidates)
    fits = [
        fit_law(Observations(candidates, law.predict(candidates), gradients=g), seed=0)
        for g in (gradients, gradients + 7.0)
    ]
    np.testing.assert_allclose(fits[0].law.t, fits[1].law.t, atol=1e-6)


def test_gradients_of_some_candidates_are_used_and_the_rest_is_not_missed():
    law = random_law(np.random.default_rng(8), 2, 6, 0.8)
    candidates = sample_candidates(6, 5, seed=0)
    gradients = tangential(law, candidates)
    gradients[[0, 2, 4]] = np.nan
    fit = fit_law(Observations(candidates, law.predict(candidates), gradients=gradients), seed=0)
    elsewhere = sample_candidates(6, 30, seed=1)
    np.testing.assert_allclose(fit.law.predict(elsewhere), law.predict(elsewhere), atol=1e-6)


def test_one_point_with_its_gradient_is_too_little_and_says_so():
    law = random_law(np.random.default_rng(8), 2, 4, 0.8)
    candidates = np.full((1, 4), 0.25)
    observations = Observations(candidates, law.predict(candidates), gradients=tangential(law, candidates))
    fit = fit_law(observations, seed=0)
    assert "do not determine" in fit.warnings[0]
    slopes = (fit.law.gradient(candidates[0]) - law.gradient(candidates[0])) @ np.diff(np.eye(4), axis=1)[:4]
    np.testing.assert_allclose(slopes, 0, atol=1e-4)


def test_an_averaging_term_is_recovered_and_left_out_on_demand():
    rng = np.random.default_rng(1)
    law = LogLinearLaw(np.log([1.5, 2.0]), rng.normal(0, 1.0, (2, 4)), averaging=np.array([-0.05, 0.02]))
    candidates, elsewhere = sample_candidates(4, 24, seed=0), sample_candidates(4, 20, seed=1)
    fit = fit_log_linear(candidates, law.predict(candidates), seed=0, averaging=True)
    np.testing.assert_allclose(fit.law.averaging, law.averaging, atol=1e-6)
    expected = LogLinearLaw(law.log_c, law.t).predict(elsewhere)
    np.testing.assert_allclose(fit.law.predict(elsewhere, averaging=False), expected, atol=1e-6)
    np.testing.assert_allclose(fit.law.predict(np.eye(4)), fit.law.predict(np.eye(4), averaging=False))
    assert (fit.loo_error < 1e-6).all()
    plain = fit_log_linear(candidates, law.predict(candidates), seed=0)
    assert (plain.loo_error > 1e-3).all()


def test_an_averaging_term_that_candidates_do_not_show_is_left_out_with_a_warning():
    law = random_law(np.random.default_rng(1), 2, 4, 1.0)
    candidates = sample_candidates(4, 8, seed=0)
    fit = fit_log_linear(candidates, law.predict(candidates), seed=0, averaging=True)
    assert fit.law.averaging is None
    assert "averaging" in fit.warnings[0]
    assert "use 9 or more" in fit.warnings[0]


def test_gradient_of_a_law_with_averaging_agrees_with_finite_differences():
    rng = np.random.default_rng(0)
    law, u = LogLinearLaw(rng.normal(size=3), rng.normal(size=(3, 4)), rng.normal(size=3)), np.full(4, 0.25)
    steps = 1e-6 * np.eye(4)
    for averaging in (True, False):
        ends = [law.predict(u + sign * steps, averaging=averaging) for sign in (1, -1)]
        expected = (ends[0] - ends[1]).T / 2e-6
        np.testing.assert_allclose(law.gradient(u, averaging=averaging), expected, rtol=1e-6, atol=1e-8)


def test_the_expression_for_cvxpy_is_the_law_without_averaging():
    law = LogLinearLaw(np.array([0.1, 0.2]), np.array([[1.0, 0.0], [0.5, -1.0]]), np.array([1.0, 2.0]))
    u = cp.Variable(2)
    expression = law.expression(u)
    assert expression.is_convex()
    u.value = np.array([0.3, 0.7])
    np.testing.assert_allclose(expression.value, law.predict(u.value[None], averaging=False)[0])


def test_standard_errors_weigh_candidates():
    rng = np.random.default_rng(12)
    law = random_law(rng, 200, 3, 0.5)
    candidates, elsewhere = sample_candidates(3, 16, seed=0), sample_candidates(3, 20, seed=1)
    stderr = np.full((16, 200), 1e-3)
    stderr[::2] = 1e-2
    losses = law.predict(candidates) + stderr * rng.normal(size=stderr.shape)

    def error(stderr):
        fit = fit_law(Observations(candidates, losses, stderr=stderr), seed=0, num_starts=4)
        return np.sqrt(((fit.law.predict(elsewhere) - law.predict(elsewhere)) ** 2).mean())

    assert error(stderr) < 0.6 * error(None)


def test_weights_by_hand():
    # Errors 1, 2, 2, 4 and 0: the median is 2, so none counts as less than 1: 1 / 1, 1 / 4, 1 / 4, 1 / 16, 1.
    stderr = np.array([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
    weights = Observations(sample_candidates(2, 5, seed=0), np.ones((5, 2)), stderr=stderr).weights
    expected = np.array([1, 0.25, 0.25, 0.0625, 1])
    np.testing.assert_allclose(weights[:, 0], expected / expected.mean())
    np.testing.assert_allclose(weights[:, 1], 1)


def test_candidates_that_hardly_vary_in_a_component_are_told_and_its_slope_stays_small():
    rng = np.random.default_rng(4)
    law = random_law(rng, 3, 3, 0.5)
    share = rng.uniform(0, 2e-4, (20, 1))
    candidates = np.hstack([sample_candidates(2, 20, seed=0) * (1 - share), share])
    losses = law.predict(candidates) + 1e-3 * rng.normal(size=(20, 3))
    fit = fit_law(Observations(candidates, losses, components=["web", "code", "math"]), seed=0)
    (warning,) = [w for w in fit.warnings if "hardly vary" in w]
    assert "vary in math (0.0" in warning
    corners = fit.law.predict(np.eye(3))
    assert np.ptp(corners, axis=0).max() < 3 * np.ptp(law.predict(np.eye(3)), axis=0).max()


def test_a_law_without_a_floor_is_told():
    candidates = sample_candidates(3, 20, seed=0)
    losses = np.column_stack([np.exp(candidates @ [0.2, 0.5, 1.0]), 1 + np.exp(candidates @ [0.2, 0.5, 1.0])])
    fit = fit_log_linear(candidates, losses, seed=0, domains=["web", "code"])
    (warning,) = fit.warnings
    assert warning.startswith("web: no floor")


def test_a_refit_without_a_candidate_is_a_fit_of_the_others():
    rng = np.random.default_rng(7)
    law = random_law(rng, 2, 3, 1.0)
    candidates = sample_candidates(3, 12, seed=0)
    losses = law.predict(candidates) + 1e-3 * rng.normal(size=(12, 2))
    fit = fit_log_linear(candidates, losses, seed=0)
    weights = np.ones((1, 12))
    weights[0, [2, 5]] = 0
    (refit,) = fit.fitter.fit_many(fit.observations, losses[None], weights, fit.law, seed=0)
    others = fit.observations.take(weights[0] > 0)
    np.testing.assert_allclose(refit.t, fit_law(others, seed=0).law.t, rtol=1e-4, atol=1e-4)


def test_calibration_is_the_slope_of_measured_on_left_out():
    rng = np.random.default_rng(7)
    law = random_law(rng, 2, 3, 1.0)
    candidates = sample_candidates(3, 12, seed=0)
    fit = fit_log_linear(candidates, law.predict(candidates) + 0.02 * rng.normal(size=(12, 2)), seed=0)
    expected = [np.polyfit(fit.left_out[:, i], fit.measured[:, i], 1)[0] for i in range(2)]
    np.testing.assert_allclose(fit.calibration, expected)


@pytest.mark.parametrize("feature", [False, True])
def test_slopes_enter_the_equations_of_the_solver_as_derivatives(feature):
    rng = np.random.default_rng(6)
    z, problems, rank = rng.normal(size=(7, 3)), 4, 3
    theta = robust.encode(
        rng.uniform(1, 2, problems), rng.normal(size=problems), rng.normal(0, 0.5, (problems, rank))
    )
    if feature:
        theta = np.column_stack([theta, rng.normal(size=problems)])
    slopes = robust.Slopes(
        np.arange(3),
        z[:3],
        rng.normal(0, 0.05, (problems, 3, rank)),
        rng.uniform(0.5, 2, (problems, 3)),
        rng.normal(size=(3, rank)) if feature else None,
    )
    s = rng.normal(size=7) if feature else None
    target = robust.predict(theta, z, s) + rng.normal(0, 0.05, (problems, 7))
    ridge = np.zeros((problems, theta.shape[1] - 1))
    regressions = robust.HuberProblems(z, target, rng.uniform(0.5, 2, target.shape), ridge, 1.0, s, slopes)
    _, gradient = regressions.normal_equations(theta)
    for k in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, k] = 1e-6
        numeric = (regressions.huber(theta + step) - regressions.huber(theta - step)) / 2e-6
        np.testing.assert_allclose(gradient[:, k], numeric, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_was_measured_twice_counts_once():
    law = random_law(np.random.default_rng(8), 2, 4, 0.8)
    candidates = np.full((2, 4), 0.25)
    observations = Observations(candidates, law.predict(candidates), gradients=tangential(law, candidates))
    assert "do not determine" in fit_law(observations, seed=0).warnings[0]
