"""The order in which held-out samples are evaluated, and their parts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data.batch import TokenBatch
from opmix_dist.pool.stream import parts_of, parts_on, stratified_order
from tests.helpers import random_tokens, uneven_batch


def test_the_order_by_hand() -> None:
    """Places of domain 0: 1/6, 3/6, 5/6; of domain 1: 1/2; of domain 2: 1/4, 3/4."""
    order = stratified_order(np.array([0, 0, 0, 1, 2, 2]))
    assert order.tolist() == [0, 4, 1, 3, 5, 2]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_first_part_has_each_domain_in_proportion(counts: list[int]) -> None:
    ids = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(ids)
    assert sorted(order) == list(range(len(ids)))
    for domain, count in enumerate(counts):
        rows = order[ids[order] == domain]
        assert (np.diff(rows) > 0).all(), "a domain's own order is kept"
        seen = np.cumsum(ids[order] == domain)
        share = np.arange(1, len(ids) + 1) * count / len(ids)
        # one sample of its own, and half of one of each other domain that it may come behind
        assert np.abs(seen - share).max() <= 1 + len(counts) * count / (2 * len(ids))


def test_parts_are_the_samples_of_their_rows() -> None:
    samples, order = uneven_batch(0, 7, 12, mask_documents=True), np.array([6, 0, 3, 1, 5])
    parts = list(parts_on(torch.device("cpu"), samples, parts_of(order, 2)))
    assert [rows.tolist() for rows, _ in parts] == [[6, 0], [3, 1], [5]]
    together = TokenBatch.cat([part for _, part in parts])
    for ours, theirs in (
        (together.tokens, samples.tokens),
        (together.loss_mask, samples.loss_mask),
        (together.position_ids, samples.position_ids),
    ):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs[torch.from_numpy(order)])


def test_no_rows_are_no_parts() -> None:
    samples = TokenBatch.of_tokens(random_tokens(0, 3, 4))
    assert list(parts_on(torch.device("cpu"), samples, parts_of(np.arange(0), 2))) == []
