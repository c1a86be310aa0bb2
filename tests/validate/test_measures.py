"""What a validation computes, on losses made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from opmix_dist.pool.calibration import Calibration
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.search.problem import Problem
from opmix_dist.validate import calibration
from opmix_dist.validate.measures import Agreement, Tried, rank_correlation, rank_of, regret, slope_of

DOMAINS = ("a", "b")
PROBLEM = Problem(composition=np.eye(2), prior=np.array([0.5, 0.5]), kl=0.0)


def test_rank_correlation_is_spearmans() -> None:
    first = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(first, first**3) == pytest.approx(1)
    # ranks 1 2 3 4 and 2 1 4 3: sum d^2 = 4, rho = 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(first, np.array([20.0, 10.0, 40.0, 30.0])) == pytest.approx(0.6)
    assert rank_correlation(first, np.ones(4)) is None
    assert rank_correlation(first[:2], first[:2]) is None


def test_slope_regret_and_rank() -> None:
    simulated = np.array([1.0, 1.1, 1.2])
    assert slope_of(2 * simulated + 5, simulated) == pytest.approx(2)
    assert slope_of(simulated, np.ones(3)) is None
    values = np.array([2.0, 1.5, 1.75, 1.5])
    assert regret(2, values) == 0.25
    assert [rank_of(i, values) for i in range(4)] == [4, 1, 3, 1]


def test_agreement_by_hand() -> None:
    real = np.array([[2.0, 4.0], [1.0, 4.5], [1.5, 3.0]])  # means 3, 2.75, 2.25
    simulated = real - [[0.1, 0.2], [0.2, -1.6], [0.3, 0.0]]  # means 2.85, 3.45, 2.1
    found = Agreement.of(simulated, real, PROBLEM)
    assert found.mean_gap == pytest.approx([-0.2, 1.4 / 3])
    assert found.largest_gap == pytest.approx([0.3, 1.6])
    assert found.spearman == pytest.approx([1, 1])  # by domain; of the means: ranks 3 2 1 and 2 3 1
    assert found.spearman_objective == pytest.approx(0.5)
    assert found.regret == 0
    wrong = simulated + np.array([[0.0, 0], [0, 0], [1, 1]])
    assert Agreement.of(wrong, real, PROBLEM).regret == pytest.approx(3 - 2.25)


def tried(real: np.ndarray, U: np.ndarray, mixtures: np.ndarray | None = None) -> Tried:
    numbers = np.arange(len(U)) if mixtures is None else mixtures
    single = np.array([number not in numbers[:i] for i, number in enumerate(numbers)])
    return Tried(U, numbers, single, real, np.array([3.0, 4.0]), old=0)


def test_corrections_recover_what_was_put_in_and_say_so_of_mixtures_left_out() -> None:
    rng = np.random.default_rng(0)
    U = np.vstack([np.eye(3), rng.dirichlet(np.ones(3), 7)])
    simulated = np.array([3.0, 4.0]) - rng.uniform(0, 0.3, (10, 2))
    changes, mixed = simulated - [3.0, 4.0], 1 - (U**2).sum(axis=1, keepdims=True)
    truths = {
        "shift": np.array([0.1, 0.2]) + changes,
        "slope": np.array([0.1, 0.2]) + 1.5 * changes,
        "affine": np.array([0.1, 0.2]) + np.array([1.5, 0.8]) * changes,
        "averaging": np.array([0.1, 0.2]) + 1.5 * changes + 0.05 * mixed,
    }
    for method, change in truths.items():
        real = np.array([3.0, 4.0]) + change
        found = {
            one.calibration.method: one
            for one in calibration.judged(tried(real, U), simulated, PROBLEM, DOMAINS)
        }
        assert found[method].error < 1e-9
        assert found[method].difference_error < 1e-9
        assert found[method].regret == 0
        assert found["none"].error == pytest.approx(np.sqrt(((simulated - real) ** 2).mean()))
        best = calibration.choose([*found.values()], "best", 10)
        assert best.difference_error < 1e-9
        if method == "shift":  # all of them correct it; none of them is needed for differences
            assert found["none"].difference_error < 1e-9
        else:
            assert found["none"].difference_error > 0.01
        assert found[method].calibration.offset == pytest.approx({"a": 0.1, "b": 0.2})
    last = found["averaging"].calibration
    assert last.slope == pytest.approx({"a": 1.5, "b": 1.5})
    assert last.averaging == pytest.approx({"a": 0.05, "b": 0.05})


def test_noise_is_not_taken_for_a_correction_that_helps() -> None:
    """In sample every correction lowers the error; on mixtures that were left out it must not seem to."""
    rng = np.random.default_rng(1)
    U = rng.dirichlet(np.ones(3), 12)
    simulated = rng.uniform(2, 3, (12, 2))
    real = simulated + rng.normal(0, 0.1, (12, 2))
    found = {
        one.calibration.method: one for one in calibration.judged(tried(real, U), simulated, PROBLEM, DOMAINS)
    }
    assert found["affine"].difference_error > found["none"].difference_error
    assert calibration.choose([*found.values()], "affine", 12) is found["affine"]
    assert calibration.choose([*found.values()], "best", 4) is found["none"]


def test_a_mixture_is_left_out_with_all_points_that_reach_it() -> None:
    """Point 3 is mixture 0 again, through another u: it must not tell what mixture 0 is."""
    U = np.array([[1.0, 0], [0, 1.0], [0.5, 0.5], [0.4, 0.6]])
    real = np.array([[3.5, 4.0], [3.0, 4.2], [2.9, 4.1], [3.5, 4.0]])
    simulated = real - np.array([[0.5, 0], [0.1, 0], [0.1, 0], [0.5, 0]])
    found = calibration.judged(tried(real, U, np.array([0, 1, 2, 0])), simulated, PROBLEM, DOMAINS)[1]
    assert found.calibration.method == "shift"
    # left out in turn: offsets of a from the others 0.1, (0.5 + 0.1) / 2 and the same, each mixture once
    errors = np.array([0.1 - 0.5, 0.3 - 0.1, 0.3 - 0.1])
    assert found.error == pytest.approx(np.sqrt((errors**2).sum() / 6))


def test_evaluations_are_corrected_as_losses_are() -> None:
    rng = np.random.default_rng(2)
    targets, ids = np.array([3, 5, 2, 4]), np.array([0, 0, 1, 1])
    sums, base = rng.uniform(5, 9, (2, 4)), rng.uniform(5, 9, (1, 4))
    gradients = rng.normal(size=(2, 2, 3))
    U = np.array([[1.0, 0, 0], [0.2, 0.3, 0.5]])
    found = Evaluations(sums, gradients, targets, ids, 2)
    snapshot = Evaluations(base, None, targets, ids, 2)
    rule = Calibration(
        method="averaging",
        offset={"b": 0.2, "a": 0.1},
        slope={"a": 1.5, "b": 0.5},
        averaging={"a": 0.3, "b": 0.0},
    )
    corrected = rule.applied(found, U, snapshot, DOMAINS)
    expected = rule.losses(found.losses.loss, U, snapshot.losses.loss[0], DOMAINS)
    assert corrected.losses.loss == pytest.approx(expected)
    a = snapshot.losses.loss[0, 0] + 0.1 + 1.5 * (found.losses.loss[1, 0] - snapshot.losses.loss[0, 0])
    assert expected[1, 0] == pytest.approx(a + 0.3 * (1 - 0.38))
    assert corrected.gradients is not None
    assert corrected.gradients[1, 0] == pytest.approx(1.5 * gradients[1, 0] - 0.6 * U[1])
    assert corrected.gradients[0, 1] == pytest.approx(0.5 * gradients[0, 1])
