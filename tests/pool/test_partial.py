"""Losses of candidates that saw a part of the samples, and their errors: by hand, and by drawing."""

from __future__ import annotations

import numpy as np
import pytest

from opmix_dist.models.loss import losses_by_domain
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.partial import estimated_losses

IDS = np.array([0, 0, 0, 1, 1])
TARGETS = np.array([2, 4, 0, 3, 1])


def test_the_reference_fills_in_by_hand() -> None:
    """Domain 0: L_r = (4 + 6) / 6; the first sample alone was seen, 1 nat better over 2 targets."""
    reference = np.array([4.0, 6.0, 0.0, 3.0, 3.0])
    sums = np.array([[3.0, 99.0, 0.0, 4.0, 3.0]])
    seen = np.array([[True, False, True, True, True]])
    found = estimated_losses(sums, seen, reference, TARGETS, IDS, 2)
    assert found.loss[0] == pytest.approx([10 / 6 - 1 / 2, 7 / 4])
    assert found.targets.tolist() == [6, 4]
    # one seen sample has no residual of its own: what is left is the reference's, n / (n - 1) of n = 1
    own = (reference[:2] - 10 / 6 * TARGETS[:2]) / 6
    assert found.stderr[0, 0] == pytest.approx(np.sqrt((own**2).sum()))
    assert found.stderr[0, 1] == pytest.approx(losses_by_domain(sums, TARGETS, IDS, 2).stderr[0, 1]), (
        "all of domain 1 was seen"
    )


def test_who_saw_all_has_its_own_loss_and_error() -> None:
    rng = np.random.default_rng(0)
    sums, reference = rng.uniform(1, 5, (3, 5)), rng.uniform(1, 5, 5)
    sums[:, 2] = reference[2] = 0.0
    found = estimated_losses(sums, np.full(sums.shape, True), reference, TARGETS, IDS, 2)
    expected = losses_by_domain(sums, TARGETS, IDS, 2)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
    np.testing.assert_allclose(found.stderr, expected.stderr, rtol=1e-12)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of one domain: a candidate's sums, the reference's and the snapshot's, much of whose spread is
    the same; true losses 3.1, 3.0 and 3.3."""
    hard = rng.normal(0, 1, count)
    return (
        3.1 + hard + rng.normal(0, 0.2, count),
        3.0 + hard + rng.normal(0, 0.2, count),
        3.3 + hard + rng.normal(0, 0.2, count),
    )


def test_standard_errors_are_those_of_other_draws() -> None:
    """Of the loss and of its change from the snapshot, 20 of 80 samples seen; and of what is resampled."""
    rng = np.random.default_rng(1)
    ids, targets = np.zeros(80, dtype=np.int64), np.ones(80, dtype=np.int64)
    seen = np.arange(80) < 20
    losses, changes, told = [], [], []
    for _ in range(400):
        candidate, reference, base = draw(rng, 80)
        one = Evaluations(np.where(seen, candidate, 0.0)[None], None, targets, ids, 1, seen[None], reference)
        snapshot = Evaluations(base[None], None, targets, ids, 1)
        losses.append(one.losses.loss[0, 0])
        changes.append(one.changes_from(snapshot).loss[0, 0])
        told.append([one.losses.stderr[0, 0], one.changes_from(snapshot).stderr[0, 0]])
    assert np.mean(losses) == pytest.approx(3.1, abs=0.02)
    assert np.mean(changes) == pytest.approx(-0.2, abs=0.02)
    assert np.mean(told, axis=0) == pytest.approx([np.std(losses), np.std(changes)], rel=0.1)
    resampled = one.resampled(2000, np.random.default_rng(2))
    assert resampled[:, 0, 0].std() == pytest.approx(one.losses.stderr[0, 0], rel=0.1)
    alone = np.std([candidate[:20].mean() for candidate, _, _ in (draw(rng, 80) for _ in range(400))])
    assert np.std(losses) < 0.7 * alone, "the reference tells nothing here"


def test_parts_of_a_search_are_put_together() -> None:
    sums, reference = np.arange(10.0).reshape(2, 5), np.ones(5)
    seen = np.array([[True, True, True, True, True], [True, False, True, True, True]])
    first = Evaluations(sums, np.ones((2, 2, 3)), TARGETS, IDS, 2, seen, reference)
    second = Evaluations(sums[:1] + 1, None, TARGETS, IDS, 2)
    both = Evaluations.joined([second, first])
    assert both.gradients is None
    assert both.stopped.tolist() == [False, False, True]
    assert both.targets_seen.tolist() == [[6, 4], [6, 4], [2, 4]]
    np.testing.assert_array_equal(both.losses.loss[1:], first.losses.loss)
    np.testing.assert_array_equal(both.losses.loss[0], second.losses.loss[0])
    assert Evaluations.joined([second, second]).seen is None


def test_a_draw_without_seen_samples_takes_the_change_as_it_was_seen() -> None:
    ids, targets = np.zeros(6, dtype=np.int64), np.ones(6, dtype=np.int64)
    reference = np.arange(6.0)
    seen = np.arange(6) < 1
    one = Evaluations((reference + 1) * seen[None], None, targets, ids, 1, seen[None], reference)
    drawn = one.resampled(200, np.random.default_rng(0))[:, 0, 0]
    same = Evaluations(reference[None], None, targets, ids, 1)
    np.testing.assert_allclose(drawn, same.resampled(200, np.random.default_rng(0))[:, 0, 0] + 1)
