import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import rel_entr

from opmix_dist.search import proposal as module
from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.proposal import (
    InfeasibleError,
    SolverError,
    paper_composition,
    propose,
    repetition_caps,
)
from opmix_dist.search.simplex import Components

# What a duality gap of 1e-8 leaves on the shares near a flat optimum.
SHARE_TOLERANCE = 2e-4


def flat_law(num_losses, num_components):
    return LogLinearLaw(np.zeros(num_losses), np.zeros((num_losses, num_components)))


def slsqp(law, composition, prior, kl, omega, caps):
    """The same problem by another method: lowest feasible objective of a few starts."""
    num_components = len(composition)

    def objective(u):
        return omega @ np.exp(law.t @ u) + kl * rel_entr(np.maximum(u @ composition, 1e-15), prior).sum()

    constraints = [{"type": "eq", "fun": lambda u: u.sum() - 1}]
    if caps is not None:
        constraints.append({"type": "ineq", "fun": lambda u: caps - u @ composition})
    best = np.inf
    for seed in range(4):
        start = np.random.default_rng(seed).dirichlet(np.ones(num_components))
        found = minimize(
            objective,
            start,
            bounds=[(0, 1)] * num_components,
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        feasible = caps is None or (found.x @ composition <= caps + 1e-7).all()
        if feasible and abs(found.x.sum() - 1) < 1e-7:
            best = min(best, found.fun)
    return best


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("capped", [False, True])
def test_optimum_agrees_with_slsqp(seed, capped):
    rng = np.random.default_rng([seed, capped])
    num_domains = int(rng.integers(2, 7))
    prior = 0.9 * rng.dirichlet(np.ones(num_domains)) + 0.1 / num_domains
    composition = Components.for_rebalance([f"d{i}" for i in range(num_domains)], prior).matrix
    law = LogLinearLaw(rng.normal(size=num_domains), rng.normal(0, 0.8, (num_domains, num_domains + 1)))
    omega = rng.uniform(0, 2, num_domains)
    kl = [0.05, 0.005, 1.0, 0.0][seed % 4]
    caps = prior + 0.08 if capped else None
    found = propose(law, composition, prior=prior, kl=kl, omega=omega, caps=caps)
    expected = slsqp(law, composition, prior, kl, omega, caps)
    assert found.objective == pytest.approx(expected, abs=2e-7)
    assert (found.u >= 0).all()
    assert found.u.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.mixture, composition.T @ found.u, atol=1e-12)
    np.testing.assert_allclose(found.predicted, np.exp(law.log_c) + np.exp(law.t @ found.u))
    assert found.solver_status == "optimal"
    if capped:
        assert (found.mixture <= caps + 1e-6).all()


def test_kl_acts_on_the_effective_mixture_by_hand():
    # Two components over three domains, flat laws: only the KL is left, x = (0.6 - 0.4 a, 0.3, 0.1 + 0.4 a).
    composition = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    prior = np.array([0.4, 0.3, 0.3])
    found = propose(flat_law(2, 2), composition, prior=prior, kl=0.05)
    np.testing.assert_allclose(found.u, [0.5, 0.5], atol=SHARE_TOLERANCE)
    np.testing.assert_allclose(found.mixture, prior, atol=SHARE_TOLERANCE)
    assert found.kl_divergence == pytest.approx(0, abs=1e-7)
    assert found.objective == pytest.approx(1)

    # With a prior that no mixture of them reaches: at an optimum inside, the ratio x_0 / p_0 = x_2 / p_2.
    found = propose(flat_law(1, 2), composition, prior=np.array([0.2, 0.6, 0.2]), kl=1.0)
    np.testing.assert_allclose(found.mixture, [0.35, 0.3, 0.35], atol=SHARE_TOLERANCE)
    by_hand = 0.7 * np.log(0.35 / 0.2) + 0.3 * np.log(0.3 / 0.6)
    assert found.kl_divergence == pytest.approx(by_hand, abs=1e-7)
    assert found.objective == pytest.approx(1 + by_hand, abs=1e-7)


def test_optimum_of_law_and_kl_by_hand():
    # Pure probes of two domains and L = exp(t u_0): the derivative of exp(t a) + kl KL vanishes where
    # t exp(t a) + kl (log(a / 0.5) - log((1 - a) / 0.5)) = 0. At a = 0.25, t = 1: kl = exp(1/4) / log 3.
    law = LogLinearLaw(np.zeros(1), np.array([[1.0, 0.0]]))
    found = propose(law, np.eye(2), prior=np.array([0.5, 0.5]), kl=float(np.exp(0.25) / np.log(3)))
    np.testing.assert_allclose(found.mixture, [0.25, 0.75], atol=SHARE_TOLERANCE)


def test_omega_says_which_loss_counts():
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0], [0.0, -1.0]]))
    for omega, best in (([1, 0], [1, 0]), ([0, 1], [0, 1]), (None, [0.5, 0.5])):
        weights = None if omega is None else np.array(omega, dtype=float)
        found = propose(law, np.eye(2), prior=np.array([0.5, 0.5]), kl=0.0, omega=weights)
        np.testing.assert_allclose(found.u, best, atol=SHARE_TOLERANCE)


def test_paper_expansion_by_hand():
    old = np.array([0.5, 0.3, 0.2])
    composition = Components.for_rebalance(["a", "b", "c"], old).matrix
    np.testing.assert_array_equal(paper_composition(composition), np.vstack([old, np.eye(3)]))

    # kl = 0 and a law that falls along the probe of b alone: all weight goes to it.
    law = LogLinearLaw(np.zeros(1), np.array([[0.0, 0.0, -2.0, 0.0]]))
    found = {e: propose(law, composition, prior=old, kl=0.0, expansion=e) for e in ("effective", "paper")}
    np.testing.assert_allclose(found["paper"].mixture, [0, 1, 0], atol=SHARE_TOLERANCE)
    np.testing.assert_allclose(found["effective"].mixture, [0.05, 0.93, 0.02], atol=SHARE_TOLERANCE)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_paper_expansion_finds_the_domain_for_any_share_and_a_pure_old_mixture(share):
    names = ["a", "b", "c"]
    for old in ([0.98, 0.01, 0.01], [1.0, 0.0, 0.0]):
        composition = Components.for_rebalance(names, np.array(old), domain_share=share).matrix
        np.testing.assert_allclose(paper_composition(composition)[1:], np.eye(3), atol=1e-12)


def test_paper_expansion_of_two_probes_is_the_effective_one():
    composition = Components.for_one_new_domain(["a", "b"], np.array([0.4, 0.6]), "n").matrix
    np.testing.assert_array_equal(paper_composition(composition), composition)


def test_paper_expansion_refuses_other_components():
    composition = np.array([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]])
    with pytest.raises(ValueError, match="component 1 does not"):
        propose(flat_law(1, 3), composition, prior=np.ones(3) / 3, expansion="paper")


def test_caps_by_hand():
    caps = repetition_caps(np.array([100.0, 400.0, 50.0]), allowed_epochs=4, tokens_to_train=1000)
    np.testing.assert_allclose(caps, [0.4, 1.6, 0.2])

    # The first domain is best, then the second: with caps 0.4 and 0.5 the third gets the remaining 0.1.
    law = LogLinearLaw(np.zeros(1), np.array([[-2.0, -1.0, 0.0]]))
    prior = np.ones(3) / 3
    found = propose(law, np.eye(3), prior=prior, kl=0.0, caps=np.array([0.4, 0.5, 1.0]))
    np.testing.assert_allclose(found.mixture, [0.4, 0.5, 0.1], atol=SHARE_TOLERANCE)
    free = propose(law, np.eye(3), prior=prior, kl=0.0)
    np.testing.assert_allclose(free.mixture, [1, 0, 0], atol=SHARE_TOLERANCE)


def test_caps_that_leave_one_mixture_give_it():
    law = LogLinearLaw(np.zeros(1), np.array([[-2.0, -1.0, 0.0]]))
    only = np.array([0.2, 0.3, 0.5])
    found = propose(law, np.eye(3), prior=np.ones(3) / 3, caps=only)
    np.testing.assert_allclose(found.mixture, only, atol=1e-6)


def test_infeasible_caps_say_what_they_sum_to():
    with pytest.raises(InfeasibleError, match=r"sum to 0\.8: the closest exceeds one by 0\.1;"):
        propose(flat_law(1, 2), np.eye(2), prior=np.ones(2) / 2, caps=np.array([0.5, 0.3]))
    # Enough tokens in all, but every component contains 10% of the first domain.
    composition = np.array([[0.1, 0.9], [0.3, 0.7]])
    with pytest.raises(InfeasibleError, match=r"sum to 1\.05: the closest exceeds one by 0\.05;"):
        propose(flat_law(1, 2), composition, prior=np.ones(2) / 2, caps=np.array([0.05, 1.0]))


def test_a_domain_of_prior_zero_gets_nothing():
    law = LogLinearLaw(np.zeros(1), np.array([[0.0, 0.0, -5.0]]))
    composition = np.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.1, 0.0, 0.9]])
    prior = np.array([0.6, 0.4, 0.0])
    found = propose(law, composition, prior=prior)
    assert found.u[2] == 0
    assert found.mixture[2] == 0
    np.testing.assert_allclose(found.mixture[:2], [0.6, 0.4], atol=SHARE_TOLERANCE)
    free = propose(law, composition, prior=prior, kl=0.0)
    assert free.u[2] > 0.999
    assert free.kl_divergence == np.inf
    with pytest.raises(ValueError, match=r"prior is 0 for domain\(s\) \[0\]"):
        propose(law, composition, prior=np.array([0.0, 0.5, 0.5]))


def test_a_solver_that_fails_is_an_error(monkeypatch):
    def give_up(self, **_):
        self._status = "optimal_inaccurate"

    monkeypatch.setattr(module.cp.Problem, "solve", give_up)
    with pytest.raises(SolverError, match="optimal_inaccurate"):
        propose(flat_law(1, 2), np.eye(2), prior=np.ones(2) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": np.eye(3)}, "law has 2 components"),
        ({"prior": np.ones(3) / 3}, "prior must have 2"),
        ({"prior": np.array([0.5, 0.6])}, "prior must sum to 1"),
        ({"omega": np.ones(3)}, "omega must have 1"),
        ({"omega": -np.ones(1)}, "not negative"),
        ({"caps": np.ones(3)}, "caps must have 2"),
        ({"caps": np.array([np.nan, 1.0])}, "caps must not be negative"),
        ({"kl": -0.1}, "kl must be finite"),
    ],
)
def test_wrong_input_says_what_is_wrong(changes, message):
    arguments = {"composition": np.eye(2), "prior": np.ones(2) / 2} | changes
    with pytest.raises(ValueError, match=message):
        propose(flat_law(1, 2), **arguments)


def test_wrong_repetition_budgets_are_refused():
    with pytest.raises(ValueError, match="tokens must not be negative"):
        repetition_caps(np.array([-1.0]), 4, 100)
    with pytest.raises(ValueError, match="above 0"):
        repetition_caps(np.array([1.0]), 0, 100)
