from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
from scipy.optimize import minimize

from opmix_dist.search import convex
from opmix_dist.search.laws import ConvexLaw, LogLinearLaw
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import InfeasibleError, Proposer, SolverError, propose, repetition_caps
from opmix_dist.search.simplex import Components

# What a duality gap of 1e-8 leaves on the shares near a flat optimum.
SHARE_TOLERANCE = 2e-4
OBJECTIVES = ("mean", "relative", "worst", "worst_change")


def flat_law(num_losses, num_components):
    return LogLinearLaw(np.zeros(num_losses), np.zeros((num_losses, num_components)))


def one_loss(t):
    return LogLinearLaw(np.zeros(1), np.array([t], dtype=float))


@dataclass(frozen=True)
class Quadratic:
    """L_i = level_i + u' Q_i u, Q_i symmetric: smooth, convex or not."""

    level: np.ndarray
    q: np.ndarray

    def predict(self, candidates, *, averaging=True):
        return self.level + np.einsum("mk,dkl,ml->md", candidates, self.q, candidates)

    def gradient(self, u, *, averaging=True):
        return 2 * self.q @ u


@dataclass(frozen=True)
class Steps:
    """A smooth law rounded to steps, as of trees."""

    law: Quadratic
    step: float

    def predict(self, candidates, *, averaging=True):
        return np.round(self.law.predict(candidates) / self.step) * self.step


@dataclass(frozen=True)
class Hidden:
    """A convex law that does not say so, or one of which only the expression is known."""

    law: LogLinearLaw

    def predict(self, candidates, *, averaging=True):
        return self.law.predict(candidates)

    def gradient(self, u, *, averaging=True):
        return self.law.gradient(u)


class Expressed(Hidden):
    def expression(self, u):
        return np.exp(self.law.log_c) + cp.exp(self.law.t @ u)


def random_problem(seed, objective, bounded):
    rng = np.random.default_rng([seed, bounded])
    num_domains = int(rng.integers(2, 6))
    prior = 0.9 * rng.dirichlet(np.ones(num_domains)) + 0.1 / num_domains
    composition = Components.for_rebalance([f"d{i}" for i in range(num_domains)], prior).matrix
    law = LogLinearLaw(rng.normal(size=num_domains), rng.normal(0, 0.8, (num_domains, num_domains + 1)))
    reference = law.predict(np.eye(num_domains + 1)[:1])[0] + 0.05
    problem = Problem(
        composition,
        prior,
        kl=[0.05, 0.005, 1.0, 0.0][seed % 4],
        objective=objective,
        omega=rng.uniform(0.1, 2, num_domains),
        reference=reference,
        max_increase=np.where(np.arange(num_domains) < 2, 0.02, np.inf) if bounded else None,
        caps=prior + 0.08 if bounded else None,
        floors=0.8 * prior if bounded else None,
    )
    return law, problem


def slsqp(law, problem):
    """The same problem by another method, numerical slopes: lowest feasible total of a few starts."""
    num_components, num_losses = law.t.shape[1], len(law.t)
    composition, bounded = problem.composition, problem.max_increase is not None

    def losses(z):
        return np.exp(law.log_c) + np.exp(law.t @ z[:-1])

    def total(z):
        value = z[-1] if problem.objective.startswith("worst") else problem.value(losses(z))
        x = np.maximum(z[:-1] @ composition, 1e-15)
        return value + problem.kl * (x @ np.log(x / problem.prior))

    constraints = [{"type": "eq", "fun": lambda z: z[:-1].sum() - 1}]
    zero = problem.reference if problem.objective == "worst_change" else 0.0
    constraints.append({"type": "ineq", "fun": lambda z: z[-1] - (losses(z) - zero)})
    if bounded:
        constraints.append({"type": "ineq", "fun": lambda z: problem.caps - z[:-1] @ composition})
        constraints.append({"type": "ineq", "fun": lambda z: z[:-1] @ composition - problem.floors})
        ceiling = np.minimum(problem.reference + problem.max_increase, 1e3)
        constraints.append({"type": "ineq", "fun": lambda z: ceiling - losses(z)})
    best = np.inf
    for seed in range(4):
        start = np.random.default_rng(seed).dirichlet(np.ones(num_components))
        found = minimize(
            total,
            np.append(start, 100.0),
            bounds=[(0, 1)] * num_components + [(None, None)],
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        u = np.clip(found.x[:-1], 0, 1)
        if abs(u.sum() - 1) < 1e-7 and not problem.violations(law.predict(u[None])[0], u):
            best = min(best, problem.total(law.predict(u[None])[0], u / u.sum()))
    assert num_losses == len(problem.omega)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bounded", [False, True])
def test_optimum_agrees_with_slsqp(seed, objective, bounded):
    law, problem = random_problem(seed, objective, bounded)
    found = propose(law, problem)
    # A loss bound may be passed by half a millionth, which buys some of the total.
    assert found.objective == pytest.approx(slsqp(law, problem), abs=1e-5 if bounded else 2e-7)
    assert (found.u >= 0).all()
    assert found.u.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.mixture, problem.composition.T @ found.u, atol=1e-12)
    np.testing.assert_allclose(found.predicted, np.exp(law.log_c) + np.exp(law.t @ found.u))
    assert found.solver_status == "optimal"
    assert problem.violations(found.predicted, found.u) == []


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bounded", [False, True])
def test_descent_of_a_law_that_does_not_say_it_is_convex_ends_at_the_same_optimum(objective, bounded):
    law, problem = random_problem(5, objective, bounded)
    found = propose(Hidden(law), problem)
    assert found.objective == pytest.approx(propose(law, problem).objective, abs=1e-5 if bounded else 1e-7)
    assert problem.violations(found.predicted, found.u) == []
    assert found.solver_status == "best of several descents"


def test_a_law_known_by_its_expression_alone():
    law, problem = random_problem(1, "mean", True)
    assert isinstance(Expressed(law), ConvexLaw)
    found, expected = propose(Expressed(law), problem), propose(law, problem)
    assert found.objective == pytest.approx(expected.objective, abs=1e-7)


def grid(steps):
    """All points of the simplex over three components with shares in steps of 1 / steps."""
    a, b = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    inside = a + b <= steps
    return np.column_stack([a[inside], b[inside], steps - a[inside] - b[inside]]) / steps


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_laws_with_several_minima_against_brute_force(seed, objective):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, 3, 3))
    law = Quadratic(np.full(2, 6.0), q + q.swapaxes(1, 2))
    problem = Problem(
        np.eye(3),
        np.ones(3) / 3,
        objective=objective,
        reference=law.predict(np.ones((1, 3)) / 3)[0],
        max_increase=np.array([0.5, np.inf]),
        floors=np.array([0.1, 0.0, 0.0]),
        caps=np.array([1.0, 0.6, 1.0]),
    )
    points = grid(200)
    losses = law.predict(points)
    feasible = problem.excesses(losses, points).max(axis=1) <= 1e-9
    brute = problem.totals(losses, points)[feasible].min()
    found = propose(law, problem)
    assert problem.violations(found.predicted, found.u) == []
    assert brute - 0.01 <= found.objective <= brute + 1e-6  # a grid of 0.005 misses a little
    # In steps: the mean of the best points is near the optimum of the smooth law.
    rough = propose(Steps(law, 0.05), problem)
    assert rough.solver_status == "mean of the best points"
    assert problem.total(law.predict(rough.u[None])[0], rough.u) <= brute + 0.06
    assert problem.violations(rough.predicted, rough.u) == []
    again = propose(Steps(law, 0.05), problem)
    np.testing.assert_array_equal(rough.u, again.u)


def test_kl_acts_on_the_effective_mixture_by_hand():
    # Two components over three domains, flat laws: only the KL is left, x = (0.6 - 0.4 a, 0.3, 0.1 + 0.4 a).
    composition = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    found = propose(flat_law(2, 2), Problem(composition, np.array([0.4, 0.3, 0.3]), kl=0.05))
    np.testing.assert_allclose(found.u, [0.5, 0.5], atol=SHARE_TOLERANCE)
    np.testing.assert_allclose(found.mixture, [0.4, 0.3, 0.3], atol=SHARE_TOLERANCE)
    assert found.kl_divergence == pytest.approx(0, abs=1e-7)
    assert found.objective == pytest.approx(2)

    # With a prior that no mixture of them reaches: at an optimum inside, the ratio x_0 / p_0 = x_2 / p_2.
    found = propose(flat_law(1, 2), Problem(composition, np.array([0.2, 0.6, 0.2]), kl=1.0))
    np.testing.assert_allclose(found.mixture, [0.35, 0.3, 0.35], atol=SHARE_TOLERANCE)
    by_hand = 0.7 * np.log(0.35 / 0.2) + 0.3 * np.log(0.3 / 0.6)
    assert found.kl_divergence == pytest.approx(by_hand, abs=1e-7)
    assert found.objective == pytest.approx(2 + by_hand, abs=1e-7)


def test_optimum_of_law_and_kl_by_hand():
    # Pure probes of two domains and L = 1 + exp(t u_0): the derivative of exp(t a) + kl KL vanishes where
    # t exp(t a) + kl (log(a / 0.5) - log((1 - a) / 0.5)) = 0. At a = 0.25, t = 1: kl = exp(1/4) / log 3.
    kl = float(np.exp(0.25) / np.log(3))
    for law in (one_loss([1, 0]), Hidden(one_loss([1, 0]))):
        found = propose(law, Problem(np.eye(2), np.array([0.5, 0.5]), kl=kl))
        np.testing.assert_allclose(found.mixture, [0.25, 0.75], atol=SHARE_TOLERANCE)


def test_a_collapsed_old_counts_with_all_of_its_domains():
    # `old` holds 0.5 a + 0.5 b, the probe of b overlaps it. Flat laws, prior = old mixture: u = old, and the
    # same x cannot be reached otherwise. With half the prior on b, x_b = 0.75 needs u = (0.5, 0.5).
    composition = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    found = propose(flat_law(2, 2), Problem(composition, np.array([0.5, 0.5, 0.0])))
    np.testing.assert_allclose(found.u, [1, 0], atol=SHARE_TOLERANCE)
    found = propose(flat_law(2, 2), Problem(composition, np.array([0.25, 0.75, 0.0])))
    np.testing.assert_allclose(found.u, [0.5, 0.5], atol=SHARE_TOLERANCE)


def test_constants_of_the_laws_decide_the_worst_loss_by_hand():
    # L_0 = e^c + e^{-u_0}, L_1 = 1 + e^{-u_1}. With c = 0 both are equal at u = (1/2, 1/2). With e^c = 1 +
    # e^{-1/4} - e^{-3/4} they are equal at u = (3/4, 1/4).
    t = -np.eye(2)
    problem = Problem(np.eye(2), np.array([0.5, 0.5]), kl=0.0, objective="worst")
    for constant, expected in ((1.0, 0.5), (1 + np.exp(-0.25) - np.exp(-0.75), 0.75)):
        law = LogLinearLaw(np.log([constant, 1.0]), t)
        found = propose(law, problem)
        np.testing.assert_allclose(found.u, [expected, 1 - expected], atol=SHARE_TOLERANCE)
        assert found.objective == pytest.approx(1 + np.exp(expected - 1), abs=1e-7)


def test_omega_says_which_loss_counts():
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0], [0.0, -1.0]]))
    for omega, best in (([1, 0], [1, 0]), ([0, 1], [0, 1]), (None, [0.5, 0.5])):
        weights = None if omega is None else np.array(omega, dtype=float)
        found = propose(law, Problem(np.eye(2), np.array([0.5, 0.5]), kl=0.0, omega=weights))
        np.testing.assert_allclose(found.u, best, atol=SHARE_TOLERANCE)


def test_paper_expansion_by_hand():
    old = np.array([0.5, 0.3, 0.2])
    composition = Components.for_rebalance(["a", "b", "c"], old).matrix
    # kl = 0 and a law that falls along the probe of b alone: all weight goes to it.
    law = one_loss([0, 0, -2, 0])
    found = {e: propose(law, Problem(composition, old, kl=0.0, expansion=e)) for e in ("effective", "paper")}
    np.testing.assert_allclose(found["paper"].mixture, [0, 1, 0], atol=SHARE_TOLERANCE)
    np.testing.assert_allclose(found["effective"].mixture, [0.05, 0.93, 0.02], atol=SHARE_TOLERANCE)


def test_caps_and_floors_bind_exactly():
    caps = repetition_caps(np.array([100.0, 400.0, 50.0]), allowed_epochs=4, tokens_to_train=1000)
    np.testing.assert_allclose(caps, [0.4, 1.6, 0.2])

    # The first domain is best, then the second: with caps 0.4 and 0.5 the third gets the remaining 0.1; with
    # a floor of 0.3 for the third the second gives way.
    law, prior = one_loss([-2, -1, 0]), np.ones(3) / 3
    for changes, expected in (
        ({"caps": np.array([0.4, 0.5, 1.0])}, [0.4, 0.5, 0.1]),
        ({"caps": np.array([0.4, 0.5, 1.0]), "floors": np.array([0, 0, 0.3])}, [0.4, 0.3, 0.3]),
        ({}, [1, 0, 0]),
    ):
        problem = Problem(np.eye(3), prior, kl=0.0, **changes)
        for form, tolerance in ((law, 1e-6), (Hidden(law), 1e-6)):
            np.testing.assert_allclose(propose(form, problem).mixture, expected, atol=tolerance)


def test_bounds_that_leave_one_mixture_give_it():
    only = np.array([0.2, 0.3, 0.5])
    law = one_loss([-2, -1, 0])
    for changes in ({"caps": only}, {"floors": only}, {"caps": only, "floors": only}):
        problem = Problem(np.eye(3), np.ones(3) / 3, **changes)
        for form in (law, Hidden(law), Steps(Quadratic(np.ones(1), np.zeros((1, 3, 3))), 0.1)):
            np.testing.assert_allclose(propose(form, problem).mixture, only, atol=2e-6)


def test_a_loss_that_may_not_rise_holds_the_mixture_back_by_hand():
    # L_0 = 1 + e^{u_0}, L_1 = 1 + e^{2 u_1}: the second is lowest at u = (1, 0), where the first has risen
    # from 1 + e^{1/2} to 1 + e. With a rise of 0.1 at most, u_0 = log(e^{1/2} + 0.1).
    law = LogLinearLaw(np.zeros(2), np.array([[1.0, 0.0], [0.0, 2.0]]))
    now = law.predict(np.array([[0.5, 0.5]]))[0]
    bounds = {"reference": now, "max_increase": np.array([0.1, np.inf])}
    problem = Problem(np.eye(2), np.array([0.5, 0.5]), kl=0.0, omega=np.array([0.0, 1.0]), **bounds)
    expected = np.log(np.exp(0.5) + 0.1)
    for form in (law, Hidden(law)):
        np.testing.assert_allclose(propose(form, problem).u, [expected, 1 - expected], atol=1e-6)


def test_nothing_may_rise_at_all_where_staying_is_best():
    # Each loss falls towards its own domain only: without a rise of any, nothing but the mixture of now.
    law = LogLinearLaw(np.zeros(2), -np.eye(2))
    now = np.array([0.3, 0.7])
    problem = Problem(
        np.eye(2), np.array([0.5, 0.5]), reference=law.predict(now[None])[0], max_increase=np.zeros(2)
    )
    for form in (law, Hidden(law)):
        np.testing.assert_allclose(propose(form, problem).u, now, atol=1e-5)


def message(law, **changes):
    names = {"domains": ("web", "code", "math"), "losses": ("web", "code", "math")}
    defaults = {"composition": np.eye(3), "prior": np.ones(3) / 3} | names
    with pytest.raises(InfeasibleError) as error:
        propose(law, Problem(**defaults | changes))
    assert error.value.closest.sum() == pytest.approx(1)
    assert error.value.failures
    return str(error.value)


def test_infeasible_caps_and_floors_are_named_with_their_amounts():
    law = flat_law(3, 3)
    told = message(law, caps=np.array([0.5, 0.2, 0.1]))
    assert told.startswith("caps sum to 0.8: allow more repetitions or train on fewer tokens: cap of ")
    assert "is exceeded by 0.2" in told
    told = message(law, floors=np.array([0.6, 0.6, 0.0]))
    assert told.startswith("floors sum to 1.2: floor of ")
    assert "is missed by 0.2" in told
    told = message(law, floors=np.array([0.0, 0.3, 0.0]), caps=np.array([1.0, 0.2, 1.0]))
    assert told.startswith("the floor of code (0.3) is above its cap (0.2): ")
    assert "by 0.1" in told
    assert told == message(
        law,
        floors=np.array([0.0, 0.3, 0.0]),
        caps=np.array([1.0, 0.2, 1.0]),
        reference=np.ones(3),
        max_increase=np.ones(3),
    )
    # Enough room in all, but every component contains 17% of code.
    composition = np.array([[0.8, 0.17, 0.03], [0.5, 0.2, 0.3], [0.1, 0.4, 0.5]])
    told = message(law, composition=composition, caps=np.array([1.0, 0.05, 1.0]))
    assert told == (
        "no mixture of the components satisfies the caps and floors: "
        "cap of code (0.05) is exceeded by 0.12 at least"
    )
    # Two that fail whatever is done: 17% of code at least, 50% of math at most. From the second component to
    # the third the cap loses 0.1 and the floor gains 0.2: the third alone fails least.
    composition[2] = [0.2, 0.3, 0.5]
    told = message(law, composition=composition, caps=np.array([1, 0.05, 1]), floors=np.array([0, 0, 0.6]))
    assert "where they fail least in all" in told
    assert "cap of code (0.05) is exceeded by 0.25 and floor of math (0.6) is missed by 0.1" in told


@pytest.mark.parametrize("form", [lambda law: law, Hidden])
def test_losses_that_rise_everywhere_are_named_with_their_amounts(form):
    # The loss of math is 1 + e^{0.1 u_0} whatever else happens, so at least 2, and now 1.969.
    law = LogLinearLaw(np.zeros(3), np.array([[-1.0, 0, 0], [0, -1.0, 0], [0.1, 0, 0]]))
    reference = np.array([2.0, 2.0, 1.969])
    told = message(form(law), reference=reference, max_increase=np.array([np.inf, np.inf, 0.01]))
    assert "loss of math rises by 0.031, max_increase allows 0.01" in told
    told = message(
        Steps(Quadratic(reference + np.array([0, 0, 0.05]), np.zeros((3, 3, 3))), 1e-3),
        reference=reference,
        max_increase=0.01,
    )
    assert "loss of math rises by 0.05, max_increase allows 0.01" in told
    # Two losses that cannot fall together: 1 + e^{-u_0} and 1 + e^{-u_1} below 1 + e^{-0.6} both.
    told = message(form(law), reference=np.full(3, 1 + np.exp(-0.6)), max_increase=np.array([0, 0, np.inf]))
    assert "loss of web rises" in told or "loss of code rises" in told


def test_infeasible_by_two_losses_has_the_least_sum_by_hand():
    # e^{-u_0} + e^{-u_1} is least at (1/2, 1/2): each is then above 1 + e^{-0.6} by e^{-0.5} - e^{-0.6}.
    law = LogLinearLaw(np.zeros(2), -np.eye(2))
    problem = Problem(
        np.eye(2), np.array([0.5, 0.5]), reference=np.full(2, 1 + np.exp(-0.6)), max_increase=np.zeros(2)
    )
    amount = f"{np.exp(-0.5) - np.exp(-0.6):.4g}"
    expected = f"loss 0 rises by {amount}, max_increase allows 0 and loss of loss 1 rises by {amount}"
    for form in (law, Hidden(law)):
        with pytest.raises(InfeasibleError, match=expected) as error:
            propose(form, problem)
        np.testing.assert_allclose(error.value.closest, [0.5, 0.5], atol=1e-3)


def test_a_domain_of_prior_zero_gets_nothing():
    law = one_loss([0, 0, -5])
    composition = np.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.1, 0.0, 0.9]])
    prior = np.array([0.6, 0.4, 0.0])
    for form in (law, Hidden(law)):
        found = propose(form, Problem(composition, prior))
        assert found.u[2] == 0
        assert found.mixture[2] == 0
        np.testing.assert_allclose(found.mixture[:2], [0.6, 0.4], atol=SHARE_TOLERANCE)
        free = propose(form, Problem(composition, prior, kl=0.0))
        assert free.u[2] > 0.999
        assert free.kl_divergence == np.inf


def test_a_single_component_is_all_there_is():
    composition = np.array([[0.3, 0.7]])
    for law in (
        flat_law(2, 1),
        Hidden(flat_law(2, 1)),
        Steps(Quadratic(np.ones(2), np.ones((2, 1, 1))), 0.1),
    ):
        found = propose(law, Problem(composition, np.array([0.5, 0.5])))
        np.testing.assert_allclose(found.u, [1.0])
        np.testing.assert_allclose(found.mixture, [0.3, 0.7])


def test_a_proposer_answers_each_law_as_if_it_were_the_first():
    first, problem = random_problem(2, "worst_change", True)
    rng = np.random.default_rng(0)
    proposer = Proposer(problem, first)
    for _ in range(3):
        law = LogLinearLaw(first.log_c, first.t + rng.normal(0, 0.05, first.t.shape))
        np.testing.assert_allclose(proposer(law).u, propose(law, problem).u, atol=SHARE_TOLERANCE)


def test_a_solver_that_fails_is_an_error(monkeypatch):
    def give_up(self, **_):
        self._status = "optimal_inaccurate"

    monkeypatch.setattr(convex.cp.Problem, "solve", give_up)
    with pytest.raises(SolverError, match="optimal_inaccurate"):
        propose(flat_law(1, 2), Problem(np.eye(2), np.ones(2) / 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": np.eye(3), "prior": np.ones(3) / 3}, "other components than the composition's 3"),
        ({"omega": np.ones(3)}, "omega must have 1 entries as the laws have, got 3"),
        ({"losses": ("a", "b")}, "losses must have 1"),
    ],
)
def test_a_law_of_another_problem_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        propose(flat_law(1, 2), Problem(**{"composition": np.eye(2), "prior": np.ones(2) / 2} | changes))


def test_wrong_repetition_budgets_are_refused():
    with pytest.raises(ValueError, match="tokens must not be negative"):
        repetition_caps(np.array([-1.0]), 4, 100)
    with pytest.raises(ValueError, match="above 0"):
        repetition_caps(np.array([1.0]), 0, 100)
