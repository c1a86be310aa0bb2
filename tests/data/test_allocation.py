import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.data.sampler import allocate, settle
from tests.data.samplers import (
    mixtures,
    sampler,
)

any_mixture = st.integers(1, 12).flatmap(mixtures)
any_history = st.integers(2, 10).flatmap(lambda d: st.lists(mixtures(d), min_size=1, max_size=30))


def test_three_batches_by_hand() -> None:
    weights, lag = np.array([0.5, 0.3, 0.2]), np.zeros(3)
    # batch of 2. owed 1, .6, .4: the first is due; of the begun units .6 is complete in .4/.3 < .6/.2
    counts, lag = allocate(lag, weights, 2)
    assert counts.tolist() == [1, 1, 0]
    np.testing.assert_allclose(lag, [0, -0.4, 0.4], atol=1e-12)
    # owed 1, .2, .8: .2/.2 = 1 comes before .8/.3
    counts, lag = allocate(lag, weights, 2)
    assert counts.tolist() == [1, 0, 1]
    np.testing.assert_allclose(lag, [0, 0.2, -0.2], atol=1e-12)
    # owed 1, .8, .2
    counts, lag = allocate(lag, weights, 2)
    assert counts.tolist() == [1, 1, 0]
    np.testing.assert_allclose(lag, [0, -0.2, 0.2], atol=1e-12)


def test_equal_weights_go_round() -> None:
    lag, order = np.zeros(3), []
    for _ in range(9):
        counts, lag = allocate(lag, np.full(3, 1 / 3), 1)
        order.append(int(counts.argmax()))
    assert order == [0, 1, 2] * 3


@given(any_mixture, st.integers(1, 40), st.integers(1, 60))
def test_constant_weights_stay_within_one_sample(weights: np.ndarray, batch: int, batches: int) -> None:
    lag, drawn = np.zeros(len(weights)), np.zeros(len(weights))
    for number in range(1, batches + 1):
        counts, lag = allocate(lag, weights, batch)
        drawn += counts
        assert counts.sum() == batch
        assert counts.min() >= 0
        assert np.abs(number * batch * weights - drawn).max() < 1 + 1e-6


def test_rare_domain_among_many_is_drawn_on_time() -> None:
    rare = 1e-4
    weights = np.append(np.full(999, (1 - rare) / 999), rare)
    lag, when = np.zeros(1000), []
    for number in range(5000):
        counts, lag = allocate(lag, weights, 8)
        if counts[-1]:
            when.append(number * 8)
    # one unit in each window of 10,000 samples
    assert [sample // 10_000 for sample in when] == [0, 1, 2, 3]


def test_no_drift_in_a_long_run() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(7))
    lag, drawn = np.zeros(7), np.zeros(7, dtype=np.int64)
    for _ in range(20_000):
        counts, lag = allocate(lag, weights, 1000)
        drawn += counts
    assert abs(math.fsum(lag)) < 1e-9
    assert np.abs(20_000 * 1000 * weights - drawn).max() < 1 + 1e-5


@given(any_history, st.integers(1, 20))
def test_changing_weights_stay_within_one_sample_with_what_is_settled(
    history: list[np.ndarray], batch: int
) -> None:
    names = [f"d{i}" for i in range(len(history[0]))]
    drawer = sampler({name: [100] for name in names}, {names[0]: 1.0}, batch)
    target = np.zeros(len(names))
    for weights in history:
        drawer.set_weights(dict(zip(names, weights, strict=True)))
        drawer.draw()
        target += batch * weights
        position = drawer.position
        assert position.drawn.sum() == batch * position.batches
        assert abs(math.fsum(position.settled)) < 1e-9
        assert np.abs(target + position.settled - position.drawn).max() < 1 + 1e-6


def test_overdrawn_domains_left_behind_must_be_settled() -> None:
    names = list("abcdef")
    drawer = sampler({name: [50] for name in names}, dict.fromkeys(names, 1 / 6), batch=3)
    drawer.draw()  # half a sample owed to each: a, b, c get one
    np.testing.assert_allclose(drawer.position.lag, [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5])
    drawer.set_weights({"d": 0.2, "e": 0.2, "f": 0.6})
    drawer.draw()
    # owed 1.1, 1.1, 2.3: four units due in a batch of three. d waits, and hands .1 to a, b and c
    assert drawer.position.drawn.tolist() == [1, 1, 1, 0, 1, 2]
    np.testing.assert_allclose(drawer.position.settled, [0.1 / 3] * 3 + [-0.1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(drawer.position.lag, [-0.7 / 1.5] * 3 + [1, 0.1, 0.3], atol=1e-12)


@pytest.mark.parametrize(("domains", "batch", "alpha"), [(4, 4, 1.0), (8, 8, 0.1), (20, 256, 1.0)])
def test_settling_is_rare_and_small(domains: int, batch: int, alpha: float) -> None:
    """A new Dirichlet mixture each batch, which no run comes near; measured 0, 0.5 and 0 per cent."""
    rng, lag = np.random.default_rng(1), np.zeros(domains)
    settled_batches, moved, batches = 0, 0.0, 2000
    for _ in range(batches):
        _, after = allocate(lag, rng.dirichlet(np.full(domains, alpha)), batch)
        lag = settle(after) if (after > 1).any() else after
        settled_batches += bool((after > 1).any())
        moved += np.maximum(lag - after, 0).sum()
    assert settled_batches <= 0.01 * batches
    assert moved <= 1e-3 * batches


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=8))
def test_settled_lags_are_bounded_and_balanced(values: list[float]) -> None:
    kept = settle(np.array(values))
    assert np.abs(kept).max() <= 1
    assert abs(math.fsum(kept)) < 1e-9
