import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.errors import UserError
from tests.data.samplers import (
    MIXES,
    SIZES,
    assert_prefix_of_order,
    draw,
    ids_of,
    sampler,
    through_json,
)

shards = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(shards, st.integers(1, 20), st.integers(1, 13), st.integers(0, 99))
def test_every_sample_once_per_epoch(sizes: list[int], block: int, batch: int, seed: int) -> None:
    total = sum(sizes)
    drawer = sampler({"a": sizes}, {"a": 1.0}, batch, seed, shuffle_block=block)
    found = ids_of(draw(drawer, -(-3 * total // batch)), 0)
    del found[3 * total :]
    # a batch may hold the end of one epoch and the start of the next, shuffled together
    for epoch in range(3):
        seen = found[: (epoch + 1) * total // batch * batch]
        assert all(0 <= i < total for i in seen)
        assert np.bincount(seen, minlength=total).max(initial=0) <= epoch + 1
    if 3 * total % batch == 0:
        assert np.bincount(found).tolist() == [3] * total


def test_epochs_differ_and_are_shuffled() -> None:
    found = ids_of(draw(sampler({"a": [500, 500]}, {"a": 1.0}, 500), 4), 0)
    assert found[:1000] != found[1000:]
    assert sorted(found[:1000]) == list(range(1000))
    in_order = np.diff(found[:1000]) == 1
    assert in_order.mean() < 0.02


def test_a_block_reads_few_shards() -> None:
    """Blocks of 20 samples from shards of 10: each 20 drawn come from exactly two shards."""
    found = ids_of(draw(sampler({"a": [10] * 30}, {"a": 1.0}, 20, shuffle_block=20), 15), 0)
    per_batch = [sorted({i // 10 for i in found[k : k + 20]}) for k in range(0, 300, 20)]
    assert [len(pair) for pair in per_batch] == [2] * 15
    order = [shard for pair in per_batch for shard in pair]
    assert order != sorted(order) == list(range(30))


def test_order_depends_on_seed_and_name_only() -> None:
    alone = ids_of(draw(sampler({"a": [30, 30]}, {"a": 1.0}), 10), 0)
    mixed = ids_of(draw(sampler({"b": [9], "a": [30, 30]}, {"a": 0.5, "b": 0.5}), 20), 1)
    assert sorted(alone) == sorted(mixed)
    assert sorted(alone) != sorted(ids_of(draw(sampler({"a": [30, 30]}, {"a": 1.0}, seed=8), 10), 0))
    assert sorted(alone) != sorted(ids_of(draw(sampler({"c": [30, 30]}, {"c": 1.0}), 10), 0))


def test_pinned_order() -> None:
    """A change of order breaks every run that is resumed across versions: it must be meant."""
    assert draw(sampler({"a": [3, 2], "b": [4]}, {"a": 0.6, "b": 0.4}), 2) == [
        ([0, 1, 0, 1], [1, 3, 3, 1]),
        ([0, 0, 0, 1], [0, 4, 2, 2]),
    ]


def test_a_domain_that_joins_leaves_the_others_as_they_are() -> None:
    alone, joined = sampler(SIZES, MIXES[0]), sampler(SIZES, MIXES[0])
    assert draw(alone, 3) == draw(joined, 3)
    joined.add_domains({"new": [4, 4], "more": [3]}, {"new": 0.5})
    assert joined.names == ("a", "b", "c", "new", "more")
    assert draw(alone, 3) == draw(joined, 3)
    joined.set_weights({"new": 1.0})
    assert ids_of(draw(joined, 1), 3)
    with pytest.raises(UserError, match="domain new is used up: max_epochs allows 4 samples of its 8"):
        joined.draw()


@pytest.mark.parametrize(
    ("domains", "caps", "message"),
    [
        ({"new": [3], "b": [7]}, None, "domain b is there already"),
        ({"new": [0]}, None, "domain new has no samples"),
        ({"new": [3]}, {"a": 1}, "max_epochs: 'a' is none of the 1 domains"),
        ({"new": [3]}, {"new": 0}, "max_epochs: new is 0"),
    ],
)
def test_a_join_that_is_refused_changes_nothing(domains: dict, caps: dict | None, message: str) -> None:
    drawer = sampler(SIZES, MIXES[0])
    with pytest.raises(UserError, match=message):
        drawer.add_domains(domains, caps)
    assert drawer.names == tuple(SIZES)
    assert draw(drawer, 3) == draw(sampler(SIZES, MIXES[0]), 3)


def test_a_domain_that_joins_again_goes_on_at_its_cursor() -> None:
    whole, found = sampler(SIZES, MIXES[1], batch=1), []
    found += ids_of(draw(whole, 6), 2)
    without = sampler({"a": SIZES["a"]}, {"a": 1.0}, batch=1)
    without.load_state_dict(through_json(whole.state_dict()))
    without.add_domains({"c": SIZES["c"]})
    assert without.position.drawn.tolist() == [whole.position.drawn[0], len(found)]
    without.set_weights({"c": 1.0})
    found += ids_of(draw(without, 7), 1)
    assert_prefix_of_order(found, "c")
    # b, which is still away, stays in the state
    last = sampler(SIZES, MIXES[0])
    last.load_state_dict(through_json(without.state_dict()))
    assert last.position.drawn.tolist() == [*whole.position.drawn[:2], 13]


def test_positions_from_before_a_join_do_not_fit() -> None:
    drawer = sampler({"a": [9]}, {"a": 1.0})
    before = drawer.position
    drawer.add_domains({"b": [9]})
    with pytest.raises(ValueError, match="position of 1 domains for a sampler of 2"):
        drawer.position = before
    with pytest.raises(ValueError, match="position of 1 domains"):
        drawer.state_dict(before)
    with pytest.raises(ValueError, match="position of 1 domains"):
        drawer.epochs(before)


def test_a_copy_runs_ahead_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [8], "b": [100]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 2.5})
    draw(drawer, 2)
    ahead = drawer.copy()
    with caplog.at_level(logging.WARNING):
        seen = draw(ahead, 8)
        assert caplog.messages == []
        ahead.set_weights({"b": 1.0})
        ahead.add_domains({"c": [3]})
        assert draw(drawer, 8) == seen  # nothing of the copy's reached it
    assert len(caplog.messages) == 3  # repeats, nearly used up, used up
    assert drawer.names == ("a", "b")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "x": 0.5}, "weights: 'x' is none of the 3 domains"),
        ({"a": 1.5, "b": -0.5}, r"b weighs -0\.5"),
        ({"a": 1.0, "b": math.nan}, "b weighs nan"),
        ({"a": math.inf}, "a weighs inf"),
        ({"a": 0.5, "b": 0.4}, r"sum to 0\.9, not 1"),
        ({}, "sum to 0, not 1"),
    ],
)
def test_weights_that_are_no_mixture(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(SIZES, weights)
    drawer = sampler(SIZES, MIXES[0])
    with pytest.raises(UserError, match=message):
        drawer.set_weights(weights)
    assert draw(drawer, 3) == draw(sampler(SIZES, MIXES[0]), 3)


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"seed": -1}, {"shuffle_block": 0}, {"on_exhausted": "repeat"}],
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(UserError, match="give"):
        sampler(SIZES, MIXES[0], **options)
