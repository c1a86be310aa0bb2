import numpy as np
import pytest

from opmix_dist.search.frontier import RESOLUTION, Frontier, pareto_front
from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import InfeasibleError, propose
from opmix_dist.search.simplex import Components

FIRST, SECOND = np.array([1.0, 0.0]), np.array([0.0, 1.0])
# L_1 = 1 + exp(-u_1), L_2 = 1 + exp(-u_2), and a third component that serves neither: the front is where
# u_3 = 0, and (L_1 - 1) (L_2 - 1) = exp(-1) on it.
RIVALS = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]))


def pure(count, **bounds):
    """Components are domains."""
    return Problem(np.eye(count), np.full(count, 1 / count), **bounds)


class Straight:
    """L_i = 2 - u_i, a convex law of its own."""

    def predict(self, candidates, *, averaging=True):
        return 2 - candidates

    def gradient(self, u, *, averaging=True):
        return -np.eye(len(u))

    def expression(self, u):
        return 2 - u


class Hollow:
    """L_i = 2 - u_i^2, with the front sqrt(2 - L_1) + sqrt(2 - L_2) = 1: weighted sums only find its ends."""

    def predict(self, candidates, *, averaging=True):
        return 2 - candidates**2

    def gradient(self, u, *, averaging=True):
        return np.diag(-2 * u)


class Jump:
    """See ``test_a_front_with_a_jump``."""

    def predict(self, candidates, *, averaging=True):
        s = candidates[:, 1]
        return np.stack([1 + 0.6 * np.sin(np.pi * s) + 0.4 * s, 2 - s], axis=1)

    def gradient(self, u, *, averaging=True):
        return np.array([[0.0, 0.6 * np.pi * np.cos(np.pi * u[1]) + 0.4], [0.0, -1.0]])


def require_front(front: Frontier):
    """Ascending in the first loss, descending in the second, on the simplex."""
    assert (np.diff(front.losses[:, 0]) > 0).all()
    assert (np.diff(front.losses[:, 1]) < 0).all()
    assert front.u.sum(axis=1) == pytest.approx(np.ones(len(front.u)))
    assert (front.u >= 0).all()


def test_the_front_of_two_rivals_by_hand():
    front = pareto_front(RIVALS, pure(3), FIRST, SECOND, points=9)
    require_front(front)
    assert len(front.u) == 9
    assert np.prod(front.losses - 1, axis=1) == pytest.approx(np.full(9, np.exp(-1)), rel=1e-5)
    assert front.losses == pytest.approx(RIVALS.predict(front.u))
    assert front.mixtures == pytest.approx(front.u)
    # no gap is wider than twice what nine even ones would be
    scaled = np.diff(front.losses, axis=0) / np.ptp(front.losses, axis=0)
    assert np.linalg.norm(scaled, axis=1).max() < 2 * np.sqrt(2) / 8


@pytest.mark.parametrize("seed", range(3))
def test_no_mixture_of_a_grid_is_better_in_both(seed):
    """Four components, overlapping, in three domains: against brute force over the coefficients."""
    rng = np.random.default_rng([seed, 7])
    components = Components.for_rebalance(["a", "b", "c"], rng.dirichlet(np.ones(3)))
    law = LogLinearLaw(rng.normal(0, 0.3, 3), rng.normal(0, 0.7, (3, 4)))
    first, second = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])  # a group against a domain
    caps = np.array([0.6, np.inf, 0.5])
    problem = Problem(components.matrix, np.full(3, 1 / 3), caps=caps)
    front = pareto_front(law, problem, first, second, points=12)
    require_front(front)
    assert (front.mixtures <= caps + 1e-6).all()
    steps = 24
    grid = np.array([
        (i, j, k, steps - i - j - k)
        for i in range(steps + 1) for j in range(steps + 1 - i) for k in range(steps + 1 - i - j)
    ]) / steps  # fmt: skip
    grid = grid[(grid @ components.matrix <= caps).all(axis=1)]
    losses = law.predict(grid) @ np.array([first, second]).T
    better = (losses[:, None] < front.losses - 1e-5).all(axis=2)
    assert not better.any()
    # and drawn as a line, the front has hardly anything of the grid below and left of it
    first_loss, second_loss = front.losses.T
    inside = losses[(losses[:, 0] > first_loss[0]) & (losses[:, 0] < first_loss[-1])]
    below = (np.interp(inside[:, 0], first_loss, second_loss) - inside[:, 1]) / np.ptp(second_loss)
    left = (np.interp(inside[:, 1], second_loss[::-1], first_loss[::-1]) - inside[:, 0]) / np.ptp(first_loss)
    assert np.minimum(below, left).max() < 0.02


def test_the_ends_are_the_optima_of_single_losses():
    """The first is the mean of a group that agrees on no corner, so that its optimum lies between them."""
    t = np.array([[-2.0, 0.0, 0.0, 0.0], [0.0, -2.5, 0.0, 0.0], [-1.0, 0.0, -1.5, 0.0]])
    law = LogLinearLaw(np.array([0.1, 0.3, -0.2]), t)
    sides = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    front = pareto_front(law, pure(4), *sides, points=3)
    assert front.u[0, :2].min() > 0.2
    for i, weights in enumerate(sides):
        alone = propose(law, pure(4, kl=0.0, omega=weights))
        assert front.losses[:, i].min() == pytest.approx(law.predict(alone.u[None])[0] @ weights, abs=1e-6)


def test_ties_at_an_end_are_broken_for_the_other_loss():
    """The first two components serve the first loss alike; of them the second serves the other better."""
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, -1.0, 0.0], [0.0, -0.5, -2.0]]))
    front = pareto_front(law, pure(3), FIRST, SECOND, points=3)
    assert front.u[0] == pytest.approx([0.0, 1.0, 0.0], abs=1e-3)


def test_the_first_gap_is_filled_where_the_front_runs_along_its_chord():
    """L_1 = 1 + exp(-u), L_2 = 1 + exp(-2 (1 - u)): the chord's slope is -(1 + 1/e), the front's
    -2 exp(3 u - 2)."""
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0], [0.0, -2.0]]))
    front = pareto_front(law, pure(2), FIRST, SECOND, points=3)
    assert front.u[1, 0] == pytest.approx((2 + np.log((1 + np.exp(-1)) / 2)) / 3, abs=1e-4)


def test_floors_and_bounds_of_losses_hold_along_the_front():
    reference = np.full(2, 1 + np.exp(-0.5))
    problem = pure(
        3,
        floors=np.array([0.0, 0.0, 0.1]),
        reference=reference,
        max_increase=np.array([0.1, np.inf]),
    )
    front = pareto_front(RIVALS, problem, FIRST, SECOND, points=6)
    require_front(front)
    assert front.u[:, 2] == pytest.approx(np.full(6, 0.1), abs=1e-5)
    assert front.losses[-1, 0] == pytest.approx(reference[0] + 0.1, abs=1e-5)
    impossible = pure(3, floors=np.array([0.0, 0.0, 0.9]), reference=reference, max_increase=np.zeros(2))
    with pytest.raises(InfeasibleError):
        pareto_front(RIVALS, impossible, FIRST, SECOND)


def test_straight_fronts_are_filled_evenly():
    """All weighted sums but one find an end."""
    front = pareto_front(Straight(), pure(2), FIRST, SECOND, points=5)
    require_front(front)
    assert front.u[:, 0] == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=0.01)


def test_hollow_fronts_are_found_by_bounds():
    front = pareto_front(Hollow(), pure(2), FIRST, SECOND, points=9)
    require_front(front)
    assert len(front.u) == 9
    assert np.sqrt(2 - front.losses).sum(axis=1) == pytest.approx(np.ones(9), abs=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_front_with_a_jump(swapped):
    """L_1 = 1 + 0.6 sin(pi s) + 0.4 s, L_2 = 2 - s, s = u_2: what lies between s = 0.18 and 1 is dominated by
    s = 1, and what is left before it is hollow."""
    sides = (SECOND, FIRST) if swapped else (FIRST, SECOND)
    front = pareto_front(Jump(), pure(2), *sides, points=6)
    require_front(front)
    assert len(front.u) == 6
    s = np.sort(front.u[:, 1])
    assert s[-1] == pytest.approx(1.0, abs=1e-3)
    assert s[0] == pytest.approx(0.0, abs=1e-3)
    assert s[-2] < 0.19


class Stairs:
    """L_i = 2 - u_i^2 in steps of 0.1."""

    def predict(self, candidates, *, averaging=True):
        return np.round(2 - candidates**2, 1)


def test_laws_of_steps_have_a_front_of_sampled_points():
    """Means of the best points are proposals here, and some of them are dominated by others: these go."""
    front = pareto_front(Stairs(), pure(3), *np.eye(3)[:2], points=12)
    require_front(front)
    assert len(front.u) >= 4
    assert np.sqrt(2 - front.losses).sum(axis=1) == pytest.approx(np.ones(len(front.u)), abs=0.2)


def test_losses_that_agree_have_one_best_mixture():
    law = LogLinearLaw(np.zeros(2), np.array([[-1.0, 0.0], [-2.0, 0.0]]))
    front = pareto_front(law, pure(2), FIRST, SECOND)
    assert front.u == pytest.approx(np.array([[1.0, 0.0]]), abs=1e-5)


def test_a_prior_pulls_the_front_inwards():
    free = pareto_front(RIVALS, pure(3), FIRST, SECOND, points=3)
    pulled = pareto_front(RIVALS, pure(3), FIRST, SECOND, points=3, kl=0.1)
    assert free.u[:, 2].max() < 1e-4
    assert pulled.u[:, 2].min() > 0.01


def test_wrong_questions():
    for weights in ([0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="not negative and not all 0"):
            pareto_front(RIVALS, pure(3), np.array(weights), SECOND)
    with pytest.raises(ValueError, match="the law has 2 losses, and weights are given of 3"):
        pareto_front(RIVALS, pure(3), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="at least 2 points, not 1"):
        pareto_front(RIVALS, pure(3), FIRST, SECOND, points=1)


def test_points_are_apart_and_the_same_for_the_same_seed():
    front = pareto_front(RIVALS, pure(3), FIRST, SECOND, points=20)
    extent = np.ptp(front.losses, axis=0)
    assert (np.abs(np.diff(front.losses, axis=0)) > RESOLUTION * extent).any(axis=1).all()
    assert np.array_equal(front.u, pareto_front(RIVALS, pure(3), FIRST, SECOND, points=20).u)
