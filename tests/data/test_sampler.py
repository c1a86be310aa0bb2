import json
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data.sampler import MixtureSampler, allocate, settle
from opmix_dist.errors import UserError

Batch = tuple[list[int], list[int]]


def sampler(
    sizes: Mapping[str, Sequence[int]], weights: Mapping[str, float], batch: int = 4, seed: int = 7, **options
) -> MixtureSampler:
    return MixtureSampler(sizes, weights, global_batch_size=batch, seed=seed, **options)


def draw(drawer: MixtureSampler, batches: int) -> list[Batch]:
    return [(domains.tolist(), ids.tolist()) for domains, ids in (drawer.draw() for _ in range(batches))]


def ids_of(batches: list[Batch], domain: int) -> list[int]:
    return [i for domains, ids in batches for d, i in zip(domains, ids, strict=True) if d == domain]


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


def mixtures(domains: int) -> st.SearchStrategy[np.ndarray]:
    """Simplex points whose weights span twelve orders of magnitude, zeros among them."""
    exponents = st.one_of(st.floats(-12, 0), st.just(-math.inf))
    raw = st.lists(exponents, min_size=domains, max_size=domains)
    return raw.map(lambda e: np.power(10.0, e)).filter(lambda w: w.sum() > 0).map(lambda w: w / w.sum())


any_mixture = st.integers(1, 12).flatmap(mixtures)
any_history = st.integers(2, 10).flatmap(lambda d: st.lists(mixtures(d), min_size=1, max_size=30))


# How many of each domain


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


# Which sample


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


def test_start_up_does_not_grow_with_samples() -> None:
    drawer = sampler({"a": [65_536] * 100_000}, {"a": 1.0}, 64)
    found = ids_of(draw(drawer, 2), 0)
    assert len(set(found)) == 128
    assert drawer._orders[0]._permutation.nbytes == 131_072


def test_order_depends_on_seed_and_name_only() -> None:
    alone = ids_of(draw(sampler({"a": [30, 30]}, {"a": 1.0}), 10), 0)
    mixed = ids_of(draw(sampler({"b": [9], "a": [30, 30]}, {"a": 0.5, "b": 0.5}), 20), 1)
    assert sorted(alone) == sorted(mixed)
    assert sorted(alone) != sorted(ids_of(draw(sampler({"a": [30, 30]}, {"a": 1.0}, seed=8), 10), 0))
    assert sorted(alone) != sorted(ids_of(draw(sampler({"c": [30, 30]}, {"c": 1.0}), 10), 0))


def test_pinned_order() -> None:
    """A change of order breaks every run that is resumed across versions: it must be meant."""
    assert draw(sampler({"a": [3, 2], "b": [4]}, {"a": 0.6, "b": 0.4}), 2) == [
        ([0, 1, 0, 1], [4, 0, 0, 1]),
        ([0, 0, 0, 1], [2, 3, 1, 3]),
    ]


# Resume


SIZES = {"a": [5, 3], "b": [7], "c": [2, 2, 9]}
MIXES = [{"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.0, "b": 0.05, "c": 0.95}, {"a": 0.9, "b": 0.1, "c": 0.0}]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_resume_at_any_point_twice(mixes: list[int], first: int, second: int, batch: int) -> None:
    whole, parts = sampler(SIZES, MIXES[0], batch), sampler(SIZES, MIXES[0], batch)
    for number, mix in enumerate(mixes):
        if number in (first, second):
            state = through_json(parts.state_dict())
            parts = sampler(SIZES, MIXES[0], batch)
            parts.load_state_dict(state)
            assert parts.state_dict() == state
        whole.set_weights(MIXES[mix])
        parts.set_weights(MIXES[mix])
        assert draw(parts, 1) == draw(whole, 1)


@given(st.permutations(["a", "b", "c", "new"]), st.integers(1, 4), st.integers(1, 15))
@settings(deadline=None)
def test_domains_that_stay_keep_their_cursors(order: list[str], keep: int, batches: int) -> None:
    before = sampler(SIZES, MIXES[0])
    seen = draw(before, batches)
    names = order[:keep]
    after = sampler({n: SIZES.get(n, [6]) for n in names}, {n: 1 / len(names) for n in names})
    after.load_state_dict(through_json(before.state_dict()))
    position = after.position
    for index, name in enumerate(names):
        assert position.drawn[index] == len(ids_of(seen, "abc".index(name)) if name in SIZES else [])
    assert abs(math.fsum(position.lag)) < 1e-9
    assert np.abs(position.lag).max() <= 1
    draw(after, 3)
    assert np.abs(after.position.lag).max() <= 1


def test_a_domain_that_comes_back_goes_on() -> None:
    alone = ids_of(draw(sampler({"c": SIZES["c"]}, {"c": 1.0}, batch=1), 13), 0)
    with_c, found = sampler(SIZES, MIXES[1], batch=1), []
    found += ids_of(draw(with_c, 6), 2)
    without = sampler({"a": SIZES["a"], "b": SIZES["b"]}, {"a": 1.0})
    without.load_state_dict(through_json(with_c.state_dict()))
    draw(without, 3)
    again = sampler(SIZES, MIXES[1], batch=1)
    again.load_state_dict(through_json(without.state_dict()))
    assert abs(math.fsum(again.position.lag)) < 1e-9  # what c was owed when it left was settled then
    while len(found) < 13:
        found += ids_of(draw(again, 1), 2)
    assert found == alone


def test_state_of_many_domains_is_small() -> None:
    names = [f"domain_{i:04d}" for i in range(2000)]
    weights = np.random.default_rng(0).dirichlet(np.ones(2000))
    drawer = sampler({name: [100, 80] for name in names}, dict(zip(names, weights, strict=True)), batch=512)
    draw(drawer, 20)
    assert len(json.dumps(drawer.state_dict(), separators=(",", ":"))) < 64 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this version reads 1"),
        ({"seed": 8}, "made with seed 8, this run has 7"),
        ({"lag": "AAAA"}, "damaged"),
        ({"drawn": "not base64"}, "damaged"),
        ({"names": None}, "damaged"),
        ({"batches": -1}, "damaged"),
    ],
)
def test_state_that_cannot_be_honoured(change: dict, message: str) -> None:
    drawer = sampler(SIZES, MIXES[0])
    with pytest.raises(UserError, match=message):
        drawer.load_state_dict({**drawer.state_dict(), **change})


def test_state_of_other_shards_is_refused() -> None:
    state = sampler(SIZES, MIXES[0]).state_dict()
    with pytest.raises(UserError, match="domain c has other shards"):
        sampler({**SIZES, "c": [2, 2, 8]}, MIXES[0]).load_state_dict(state)


# Limits and refusals


def test_max_epochs_stops_before_the_batch_that_passes_it() -> None:
    drawer = sampler({"a": [10], "b": [100]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 1.5})
    draw(drawer, 7)
    np.testing.assert_allclose(drawer.epochs(), [1.4, 0.14])
    position = drawer.position
    with pytest.raises(UserError, match="domain a is used up: max_epochs allows 15 samples of its 10"):
        drawer.draw()
    assert drawer.position is position
    drawer.set_weights({"b": 1.0})
    drawer.draw()


def test_one_warning_when_a_domain_repeats(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [8], "b": [100]}, {"a": 0.5, "b": 0.5})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 4)
        assert caplog.messages == []
        draw(drawer, 6)
    assert caplog.messages == ["domain a begins to repeat: all its samples were drawn once"]


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


@pytest.mark.parametrize("sizes", [[], [0, 0], [4, -1]])
def test_domain_without_samples(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="domain a has no samples"):
        sampler({"a": sizes}, {"a": 1.0})


def test_max_epochs_of_an_unknown_domain_or_no_number() -> None:
    with pytest.raises(UserError, match="max_epochs: 'x' is none"):
        sampler(SIZES, MIXES[0], max_epochs={"x": 1})
    with pytest.raises(UserError, match="max_epochs: a is nan"):
        sampler(SIZES, MIXES[0], max_epochs={"a": math.nan})
