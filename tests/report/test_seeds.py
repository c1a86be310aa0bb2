from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from opmix_dist.report.seeds import Spread, paired


def test_mean_and_sample_deviation():
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3, 3.0, pytest.approx(math.sqrt(7)))
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_one_value_has_no_deviation():
    assert Spread.of([2.0]).deviation is None
    difference = paired({3: 1.0}, {3: 1.5}, 0.95)
    assert difference is not None
    assert (difference.n, difference.mean, difference.deviation) == (1, -0.5, None)
    assert (difference.low, difference.high) == (None, None)
    assert not difference.certain


def test_the_interval_is_students_and_pairs_are_those_of_a_seed():
    # differences 1, 2 and 3: mean 2, deviation 1; t of 2 degrees at 97.5% is 4.3027
    mine, its = {0: 11.0, 1: 22.0, 2: 33.0, 7: 0.0}, {2: 30.0, 0: 10.0, 1: 20.0}
    difference = paired(mine, its, 0.95)
    assert difference is not None
    assert (difference.n, difference.mean, difference.deviation) == (3, 2.0, 1.0)
    assert difference.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert difference.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert not difference.certain
    assert paired(mine, its, 0.8).certain  # type: ignore[union-attr]
    assert paired({0: 1.0}, {1: 1.0}, 0.95) is None


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2, 6))
    mine, its = dict(enumerate(first)), dict(enumerate(second))
    difference = paired(mine, its, 0.9)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
