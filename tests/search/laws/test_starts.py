"""The optimum that the fit reaches, beside what many more single runs reach."""

import numpy as np
import pytest
from scipy.optimize import minimize

from opmix_dist.search.laws import LogLinearLaw, Observations, fit_law, robust, starts

DELTA = 0.02


def observations(seed, components, points, num_losses, noise, strength=1.0):
    rng = np.random.default_rng([seed, components, points])
    candidates = rng.dirichlet(np.full(components, strength), points)
    candidates[candidates < 1e-3] = 0
    candidates /= candidates.sum(axis=1, keepdims=True)
    law = LogLinearLaw(rng.normal(0.5, 0.2, num_losses), rng.normal(0, 0.3, (num_losses, components)))
    losses = law.predict(candidates)
    return Observations(candidates, losses + noise * rng.standard_t(3, losses.shape))


def objective(parameters, candidates, losses):
    exponential = np.exp(candidates @ parameters[1:])
    residual = np.exp(parameters[0]) + exponential - losses
    size = np.abs(residual)
    value = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
    pull = np.clip(residual, -DELTA, DELTA)
    return value, np.append(pull.sum() * np.exp(parameters[0]), (pull * exponential) @ candidates)


def lowest(observed, domain, starts_at):
    """The lowest objective of single L-BFGS runs in the plain coordinates (c, t)."""
    found = [
        minimize(
            objective,
            start,
            args=(observed.candidates, observed.losses[:, domain]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9},
        )
        for start in starts_at
    ]
    return min(run.fun for run in found)


def schedule_of_the_authors(components, domain, slopes_each):
    """10 values of log c in [-2, 1.5], slopes_each random slopes for each of them: the own domain's in
    (-1, 0), others in (0, 0.1) (arXiv 2605.15220)."""
    rng = np.random.default_rng(domain)
    for log_c in np.repeat(np.linspace(-2, 1.5, 10), slopes_each):
        slopes = 0.1 * rng.uniform(size=components)
        slopes[domain] = -rng.uniform()
        yield np.append(log_c, slopes)


def around_the_losses(losses, components, count):
    """Random constants below the losses, with slopes that reach their mean from there."""
    rng = np.random.default_rng(count)
    for share in rng.uniform(0.02, 0.98, count):
        constant = share * losses.min()
        level = np.log(losses.mean() - constant)
        yield np.append(np.log(constant), level + rng.normal(0, 0.3, components))


@pytest.mark.parametrize(
    ("components", "points", "noise", "strength"),
    [
        (2, 9, 0.05, 1.0),
        (3, 12, 2e-3, 1.0),
        (4, 12, 0.01, 1.0),
        (6, 20, 2e-3, 1.0),
        (7, 20, 0.05, 1.0),
        (17, 128, 1e-2, 0.14),
    ],
)
def test_objective_is_no_higher_than_after_many_single_runs(components, points, noise, strength):
    observed = observations(1, components, points, 2, noise, strength)
    law = fit_law(observed, seed=0).law
    for domain in range(2):
        losses = observed.losses[:, domain]
        ours, _ = objective(np.append(law.log_c[domain], law.t[domain]), observed.candidates, losses)
        schedule = schedule_of_the_authors(components, domain, 1)
        around = around_the_losses(losses, components, 2 if components == 17 else 8)
        assert ours <= lowest(observed, domain, [*schedule, *around]) * (1 + 1e-6)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_starts_that_are_dropped_where_points_are_many_would_not_have_won(noise, monkeypatch):
    observed = observations(2, 8, 120, 3, noise, 0.3)
    z = observed.candidates[:, :-1] - observed.candidates[:, :-1].mean(axis=0)
    target = observed.losses.T
    ridge = np.zeros((3, 8))
    problems = robust.HuberProblems(z, target, np.ones_like(target), ridge, DELTA)
    few, _ = starts.best_of_starts(problems, 64, 0)
    monkeypatch.setattr(starts, "HEATS", ())
    everything, _ = starts.best_of_starts(problems, 64, 0)
    np.testing.assert_allclose(problems.objective(few), problems.objective(everything), rtol=1e-7)
