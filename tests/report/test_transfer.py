"""The matrix (after stage, on domain) and what is read off it, against numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opmix_dist.report.transfer import Matrix


@pytest.fixture
def matrix() -> Matrix:
    """Three stages: a and b, then c, then d. b is forgotten and comes back, a gets better and then worse."""
    return Matrix.of(
        "loss",
        ["pretrain", "midtrain", "instruct"],
        {"a": 8.0, "b": 8.0, "c": 8.0, "d": 8.0},
        [
            {"a": 3.0, "b": 2.0, "c": 6.0, "d": 7.0},
            {"a": 2.5, "b": 2.6, "c": 3.0, "d": 6.5},
            {"a": 2.9, "b": 2.1, "c": 3.4, "d": 1.0},
        ],
        [{"a": 50, "b": 50, "c": 0}, {"a": 10, "c": 90, "d": 0}, {"d": 10}],
    )


def test_a_domain_joins_where_it_is_first_read(matrix: Matrix):
    assert matrix.domains == ("a", "b", "c", "d")
    assert matrix.joined.tolist() == [1, 1, 2, 3]
    assert matrix.old(3).tolist() == [True, True, True, False]
    assert matrix.new(2).tolist() == [False, False, True, False]


def test_forgetting_is_the_rise_over_the_best_so_far(matrix: Matrix):
    assert np.isnan(matrix.forgetting(1)).all()
    assert matrix.forgetting(2)[:2] == pytest.approx([-0.5, 0.6])
    # a: 2.9 over its 2.5 after stage 2; b: 2.1 over its 2.0 after stage 1; c: 3.4 over 3.0
    assert matrix.forgetting(3) == pytest.approx([0.4, 0.1, 0.4, math.nan], nan_ok=True)
    assert matrix.mean_forgetting(3) == pytest.approx(0.3)
    assert math.isnan(matrix.mean_forgetting(1)), "nothing was old"


def test_acquisition_is_the_fall_in_the_stage_in_which_a_domain_joins(matrix: Matrix):
    assert matrix.acquisition(2) == pytest.approx([math.nan, math.nan, 3.0, math.nan], nan_ok=True)
    assert matrix.acquisition(1)[:2] == pytest.approx([5.0, 6.0])
    # c: 6 - 3; d: 6.5 - 1; a and b began with a model that had read nothing
    assert matrix.mean_acquisition() == pytest.approx((3.0 + 5.5) / 2)


def test_transfer_by_hand(matrix: Matrix):
    # since they were learnt, a went from 3.0 to 2.9, b from 2.0 to 2.1, c from 3.0 to 3.4
    assert matrix.backward_transfer() == pytest.approx((0.1 - 0.1 - 0.4) / 3)
    # before they joined, c went from 8 to 6, d from 8 to 6.5
    assert matrix.forward_transfer() == pytest.approx((2.0 + 1.5) / 2)


def test_averages(matrix: Matrix):
    assert matrix.average(3) == pytest.approx((2.9 + 2.1 + 3.4 + 1.0) / 4)
    assert matrix.average(3, matrix.old(3)) == pytest.approx(2.8)
    assert matrix.average(3, matrix.new(3)) == pytest.approx(1.0)


def test_one_stage_from_a_trained_model_has_old_domains_too():
    matrix = Matrix.of("loss", ["one"], {"a": 2.0, "b": 5.0}, [{"a": 2.3, "b": 3.0}], [{"b": 9}], {"a": 100})
    assert matrix.joined.tolist() == [0, 1]
    assert matrix.mean_forgetting(1) == pytest.approx(0.3)
    assert matrix.mean_acquisition() == pytest.approx(2.0)
    assert matrix.backward_transfer() == pytest.approx(-0.3)
    assert math.isnan(matrix.forward_transfer()), "no domain waited for its stage"


def test_what_was_not_measured_makes_no_mean_of_the_rest():
    matrix = Matrix.of(
        "loss",
        ["one", "two"],
        {},
        [{"a": 3.0, "b": 2.0}, {"a": 3.5, "b": 2.5, "c": 1.0}],
        [{"a": 1, "b": 1}, {"c": 1}],
    )
    assert matrix.values[1] == pytest.approx([3.0, 2.0, math.nan], nan_ok=True)
    assert matrix.forgetting(2)[:2] == pytest.approx([0.5, 0.5])
    assert math.isnan(matrix.mean_acquisition()), "c was not measured before it joined"
    assert math.isnan(matrix.forward_transfer())


def test_a_domain_that_no_stage_reads_is_neither_old_nor_new():
    matrix = Matrix.of("loss", ["one"], {"a": 9.0, "z": 9.0}, [{"a": 3.0, "z": 8.0}], [{"a": 1, "z": 0}])
    assert matrix.joined.tolist() == [1, 2]
    assert not (matrix.old(1) | matrix.new(1))[1]
    assert matrix.backward_transfer() != matrix.backward_transfer(), "nothing is old"
    assert math.isnan(matrix.forward_transfer()), "it never joined"


def test_rows_and_columns_must_fit():
    with pytest.raises(ValueError, match=r"must be \(2, 1\)"):
        Matrix("loss", ("one",), ("a",), np.zeros((1, 1)), np.zeros(1, int))
