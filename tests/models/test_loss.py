"""Losses of samples against transformers' own, and of domains against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opmix_dist.models.loss import losses_by_domain, sample_loss_sums, sample_losses
from tests.helpers import tiny_llama, uneven_batch

LENGTH = 16


def test_sums_are_those_of_the_targets_only() -> None:
    """transformers' mean over labels, one sample after the other."""
    model, batch = tiny_llama().eval(), uneven_batch(1, 6, LENGTH)
    labels = batch.tokens.masked_fill(~batch.loss_mask, -100)
    found = sample_losses(model, batch)
    assert batch.targets.tolist()[::3] == [0, 0]
    for row, count in enumerate(batch.targets.tolist()):
        if count == 0:
            assert found[row] == 0
            continue
        mean = model(input_ids=batch.tokens[[row]], labels=labels[[row]]).loss
        assert found[row].item() == pytest.approx(mean.item() * count, rel=1e-6)
    parts = sample_loss_sums(model, batch, batch_size=4)
    assert parts.dtype == torch.float64
    torch.testing.assert_close(parts, found.detach().double(), rtol=1e-6, atol=0)


def test_samples_without_targets_have_gradients_of_zero_not_nan() -> None:
    model, batch = tiny_llama(), uneven_batch(1, 1, LENGTH)
    assert batch.targets.tolist() == [0]
    sample_losses(model, batch).sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_domain_losses_worked_out_by_hand() -> None:
    """Domain 0: sums 2, 6 over 1, 3 targets, and an empty sample. Domain 1: 3 over 2. Domain 2: none."""
    sums = np.array([[2.0, 6.0, 3.0, 0.0, 0.0], [1.0, 7.0, 3.0, 0.0, 0.0]])
    targets = np.array([1, 3, 2, 0, 0])
    found = losses_by_domain(sums, targets, np.array([0, 0, 1, 0, 2]), 3)
    np.testing.assert_allclose(found.loss, [[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]])
    # residuals s - 2 n are 0 and 0, then -1 and 1: sqrt(2 * 2 / 1) / 4
    np.testing.assert_allclose(found.stderr, [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    assert found.targets.tolist() == [4, 2, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stays_in_its_domain(bad: float) -> None:
    sums, targets = np.array([[2.0, bad, 6.0], [2.0, 2.0, 6.0]]), np.array([1, 1, 3])
    with np.errstate(invalid="ignore"):
        found = losses_by_domain(sums, targets, np.array([0, 0, 1]), 2)
    assert not np.isfinite(found.loss[0, 0])
    assert found.loss[:, 1].tolist() == [2.0, 2.0]
    assert found.loss[1, 0] == 2.0
    assert found.stderr[0, 1] == 0.0


def test_with_equal_targets_it_is_the_standard_error_of_the_mean() -> None:
    means = np.random.default_rng(0).normal(3.0, 1.0, size=(2, 10))
    found = losses_by_domain(15 * means, np.full(10, 15), np.zeros(10, dtype=np.int64), 1)
    np.testing.assert_allclose(found.loss[:, 0], means.mean(axis=1))
    np.testing.assert_allclose(found.stderr[:, 0], means.std(axis=1, ddof=1) / np.sqrt(10))


def test_the_standard_error_is_the_spread_of_repeated_ratios() -> None:
    """Clusters of unequal size whose mean goes with their size: the error of a mean of means would be off."""
    rng = np.random.default_rng(1)
    targets = rng.integers(1, 30, size=(4000, 50))
    sums = targets * (2.0 + 0.05 * targets + rng.normal(0, 0.3, size=targets.shape))
    ids = np.zeros(50, dtype=np.int64)
    found = [losses_by_domain(s, n, ids, 1) for s, n in zip(sums, targets, strict=True)]
    spread = np.std([f.loss[0] for f in found])
    assert np.mean([f.stderr[0] for f in found]) == pytest.approx(spread, rel=0.05)
