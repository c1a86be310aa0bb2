import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.search.laws import LogLinearLaw
from opmix_dist.search.simplex import Components, coefficients_of
from opmix_dist.search.what_if import Forecast, Reach, as_mixed_as, distance_outside, with_shares


def test_predictions_are_the_laws_by_hand():
    law = LogLinearLaw(np.log([2.0, 1.0]), np.array([[0.0, np.log(3.0)], [np.log(2.0), 0.0]]))
    forecast = Forecast.of(law, [law, law], np.array([[1.0, 0.0], [0.5, 0.5]]))
    levels = forecast.levels(0.9)
    # 2 + exp(0), 1 + exp(log 2); then 2 + sqrt(3), 1 + sqrt(2)
    assert levels.value == pytest.approx(np.array([[3.0, 3.0], [2 + 3**0.5, 1 + 2**0.5]]))
    assert np.array_equal(levels.low, levels.value)
    assert np.array_equal(levels.high, levels.value)
    changes = forecast.changes(0, 0.9)
    assert changes.value == pytest.approx(np.array([[0, 0], [3**0.5 - 1, 2**0.5 - 2]]))
    means = forecast.joined(lambda losses: losses.mean(axis=-1, keepdims=True)).levels(0.9)
    assert means.value == pytest.approx(np.array([[3.0], [(3 + 3**0.5 + 2**0.5) / 2]]))


def test_intervals_are_quantiles_and_changes_are_paired():
    """Laws that differ by a shift only: levels are uncertain by the shift, changes not at all."""
    resampled = [
        LogLinearLaw(np.log([1.0 + shift]), np.array([[0.0, 0.5]])) for shift in np.linspace(0, 1, 101)
    ]
    forecast = Forecast.of(resampled[50], resampled, np.array([[1.0, 0.0], [0.0, 1.0]]))
    levels = forecast.levels(0.9)
    assert levels.value - levels.low == pytest.approx(np.full((2, 1), 0.45))
    assert levels.high - levels.value == pytest.approx(np.full((2, 1), 0.45))
    changes = forecast.changes(0, 0.9)
    for value in (changes.value, changes.low, changes.high):
        assert value == pytest.approx(np.array([[0.0], [np.exp(0.5) - 1]]))
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, not 90"):
        forecast.levels(90)


def test_what_averaging_probes_gives_is_left_out():
    plain = LogLinearLaw(np.zeros(1), np.array([[0.5, 1.0]]))
    law = LogLinearLaw(plain.log_c, plain.t, averaging=np.array([-0.3]))
    U = np.array([[0.5, 0.5], [1.0, 0.0]])
    assert law.predict(U)[0] < plain.predict(U)[0]
    forecast = Forecast.of(law, [law, law], U)
    assert np.array_equal(forecast.losses, plain.predict(U))
    assert np.array_equal(forecast.resampled[1], plain.predict(U))


def test_the_others_keep_their_proportions():
    assert with_shares(np.array([0.5, 0.3, 0.2]), {0: 0.75}) == pytest.approx([0.75, 0.15, 0.1])
    assert with_shares(np.array([0.5, 0.3, 0.2]), {1: 0.2, 2: 0.0}) == pytest.approx([0.8, 0.2, 0.0])
    assert with_shares(np.array([0.5, 0.5, 0.0]), {2: 1.0}) == pytest.approx([0.0, 0.0, 1.0])
    assert with_shares(np.array([1.0, 0.0]), {0: 0.4, 1: 0.6}) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({0: 1.2}, "between 0 and 1, not 1.2"),
        ({0: -0.1}, "between 0 and 1, not -0.1"),
        ({0: 0.7, 1: 0.4}, r"sum to 1\.1, which is more than 1"),
        ({0: 0.5}, "no share in the mixture that could grow"),
        ({0: 0.4, 1: 0.1, 2: 0.1}, r"sum to 0\.6"),
    ],
)
def test_shares_that_make_no_mixture(shares, message):
    with pytest.raises(ValueError, match=message):
        with_shares(np.array([1.0, 0.0, 0.0]), shares)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=6),
    st.floats(0, 1),
)
def test_a_set_share_is_exact_and_ratios_stay(weights, share):
    mixture = np.array(weights) / sum(weights)
    changed = with_shares(mixture, {0: share})
    assert changed[0] == pytest.approx(share)
    assert changed.sum() == pytest.approx(1)
    assert changed[1] * mixture[2] == pytest.approx(changed[2] * mixture[1])


HALVES = Components.for_rebalance(["a", "b"], np.array([0.5, 0.5]), domain_share=1.0).matrix


def test_coefficients_between_all_of_old_and_none_by_hand():
    """Half of each domain is u = (t, (1 - t) / 2, (1 - t) / 2) for any t, with sum u^2 = t^2 + (1 - t)^2 / 2:
    least, 1/3, at t = 1/3. Half of `old` has 0.375, as has (0.25, 0.5, 0.25)."""
    u = coefficients_of(np.array([0.5, 0.5]), HALVES)
    assert u == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-5)
    assert as_mixed_as(np.array([0.25, 0.5, 0.25]), u, HALVES) == pytest.approx([0.5, 0.25, 0.25], abs=1e-5)
    assert as_mixed_as(np.array([1.0, 0.0, 0.0]), u, HALVES) == pytest.approx([1.0, 0.0, 0.0], abs=1e-5)
    assert as_mixed_as(np.full(3, 1 / 3), u, HALVES) == pytest.approx(u)


def test_one_set_of_coefficients_stays():
    u = np.array([0.2, 0.3, 0.5])
    assert as_mixed_as(np.array([1.0, 0.0, 0.0]), u, np.eye(3)) == pytest.approx(u)


@pytest.mark.parametrize("seed", range(5))
def test_the_mixture_stays_and_as_many_probes_are_mixed(seed):
    rng = np.random.default_rng([seed, 3])
    composition = Components.for_rebalance(list("abcd"), rng.dirichlet(np.ones(4))).matrix
    mixture, like = rng.dirichlet(np.ones(5)) @ composition, rng.dirichlet(np.ones(5))
    u = coefficients_of(mixture, composition)
    found = as_mixed_as(like, u, composition)
    assert found @ composition == pytest.approx(mixture, abs=1e-5)
    assert found.sum() == pytest.approx(1)
    assert u @ u <= found @ found + 1e-9
    assert found @ found <= max(like @ like, u @ u) + 1e-6


def test_distance_from_the_candidates_by_hand():
    candidates = np.array([[0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.2, 0.4, 0.4]])
    assert distance_outside(np.array([0.3, 0.6, 0.1]), candidates) == pytest.approx(0.0, abs=1e-9)
    # only the last candidate has the third component, 0.4 of it: 0.3 of the coefficients have to move
    assert distance_outside(np.array([0.1, 0.2, 0.7]), candidates) == pytest.approx(0.3)
    assert distance_outside(np.array([0.0, 0.0, 1.0]), candidates) == pytest.approx(0.6)
    assert distance_outside(np.array([1.0, 0.0, 0.0]), np.zeros((0, 3))) == 1.0


def test_reach_is_what_nine_of_ten_candidates_keep():
    """On a line: left out, only the two ends lie outside of the others, by 0.1 and 0.4."""
    share = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0])
    reach = Reach.of(np.stack([share, 1 - share], axis=1))
    distances = np.array([0.1, 0, 0, 0, 0, 0, 0, 0.4])
    assert reach.ordinary == pytest.approx(np.quantile(distances, 0.9))
    assert reach.covers(np.array([0.9, 0.1]))
    narrow = Reach.of(np.stack([share[:-1], 1 - share[:-1]], axis=1))
    assert narrow.ordinary == pytest.approx(np.quantile([0.1, 0, 0, 0, 0, 0, 0.1], 0.9))
    assert narrow.covers(np.array([0.7, 0.3]))
    assert not narrow.covers(np.array([0.75, 0.25]))
