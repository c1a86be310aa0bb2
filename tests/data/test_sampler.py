import hashlib
import json
import logging
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data import sampler_state
from opmix_dist.data.order import DomainOrders
from opmix_dist.data.sampler import SHUFFLE_BLOCK, MixtureSampler, Position, allocate, settle
from opmix_dist.data.sampler_state import _pack, name_hashes
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


def random_state(domains: int) -> tuple[MixtureSampler, dict]:
    """Names that do not compress, every lag random, up to 1e9 samples drawn of each."""
    rng = np.random.default_rng(0)
    letters = np.array(list(string.ascii_letters + string.digits))
    names = ["".join(rng.choice(letters, 64)) for _ in range(domains)]
    sizes = {name: rng.integers(1, 10**6, 3) for name in names}
    drawer = sampler(sizes, {names[0]: 1.0}, batch=512)
    lag = settle(rng.uniform(-1, 1, domains))
    drawer.position = Position(10**6, rng.integers(0, 10**9, domains), lag, rng.uniform(-1, 1, domains))
    return drawer, drawer.state_dict()


def test_state_of_many_domains_is_small_and_exact() -> None:
    drawer, state = random_state(2000)
    assert len(json.dumps(state)) < 62_000  # of 65,536; 60,000 of it are bits that nothing can spare
    again = sampler(drawer._orders.shard_sizes, {drawer.names[0]: 1.0}, batch=512)
    again.load_state_dict(through_json(state))
    assert again.position.lag.tolist() == drawer.position.lag.tolist()
    assert again.position.drawn.tolist() == drawer.position.drawn.tolist()
    assert again.state_dict() == state
    weights = dict.fromkeys(drawer.names, 1 / 2000)
    drawer.set_weights(weights)
    again.set_weights(weights)
    assert draw(again, 2) == draw(drawer, 2)


def packed(*values: float, dtype: str) -> str:
    return _pack(np.array(values, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1; this version reads 2"),
        ({"seed": 8}, "made with seed 8, this run has 7"),
        (
            {"shuffle_block": 9},
            "made with data.shuffle_block 9, this run has 65536, .*set data.shuffle_block to 9",
        ),
        ({"name": None}, "damaged"),
        ({"name": packed(1, 1, 2, dtype="<u8")}, "damaged"),
        ({"shards": packed(1, 2, dtype="<u4")}, "damaged"),
        ({"drawn": "not base 85 \n"}, "damaged"),
        ({"drawn": packed(1, 2, -1, dtype="<i8")}, "damaged"),
        ({"drawn": packed(1, 2, 2**60, dtype="<i8")}, "damaged"),
        ({"lag": "0" * 20}, "damaged"),
        ({"lag": packed(0, 0, dtype="<f8")}, "damaged"),
        ({"lag": packed(0, math.nan, 0, dtype="<f8")}, "damaged"),
        ({"lag": packed(2, -1, -1, dtype="<f8")}, "damaged"),
        ({"lag": packed(0.5, 0.5, 0, dtype="<f8")}, "damaged"),
        ({"lag": packed(0, 0, 0, dtype="<f8")[:-5]}, "damaged"),
        ({"batches": -1}, "damaged"),
        ({"batches": True}, "damaged"),
        ({"batches": 1.5}, "damaged"),
    ],
)
def test_state_that_cannot_be_honoured(change: dict, message: str) -> None:
    drawer = sampler(SIZES, MIXES[0])
    draw(drawer, 2)
    position, state = drawer.position, drawer.state_dict()
    with pytest.raises(UserError, match=message):
        drawer.load_state_dict({**state, **change})
    assert drawer.position is position
    drawer.load_state_dict(state)


def test_state_of_no_domains_or_no_state_is_damaged() -> None:
    drawer = sampler(SIZES, MIXES[0])
    none = {column: packed(dtype="<u8") for column in ("name", "shards", "drawn", "lag")}
    for state in ({**drawer.state_dict(), **none}, [], None):
        with pytest.raises(UserError, match="damaged"):
            drawer.load_state_dict(state)


def test_state_that_unpacks_to_more_than_is_read_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_state, "_MAX_UNPACKED_BYTES", 100)
    drawer = sampler({f"d{i}": [3] for i in range(13)}, {"d0": 1.0})
    with pytest.raises(UserError, match="damaged"):
        drawer.load_state_dict(drawer.state_dict())


def test_state_of_other_shards_is_refused() -> None:
    state = sampler(SIZES, MIXES[0]).state_dict()
    drawer = sampler({**SIZES, "c": [2, 2, 8]}, MIXES[0])
    with pytest.raises(UserError, match="domain c has other shards"):
        drawer.load_state_dict(state)
    without = sampler({"a": SIZES["a"], "b": SIZES["b"]}, {"a": 1.0})
    without.load_state_dict(state)
    with pytest.raises(UserError, match="domain c has other shards"):
        without.add_domains({"c": [2, 2, 8]})
    assert without.names == ("a", "b")
    without.add_domains({"c": SIZES["c"]})


def test_names_of_the_same_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash cut to one byte, so that two of 300 names must share one."""
    whole = hashlib.sha256
    monkeypatch.setattr(
        sampler_state.hashlib, "sha256", lambda data: SimpleNamespace(digest=lambda: whole(data).digest()[:1])
    )
    with pytest.raises(UserError, match=r"domains 'd\d+' and 'd\d+' have the same hash: rename one"):
        name_hashes(f"d{i}" for i in range(300))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_batch_size_may_change_between_states(parts: list[tuple[int, int]]) -> None:
    """Each domain's samples go on in its order, without loss or repeat."""
    state, found = None, {name: [] for name in SIZES}
    for batch, mix in parts:
        drawer = sampler(SIZES, MIXES[mix], batch)
        if state is not None:
            drawer.load_state_dict(through_json(state))
        before = drawer.position.drawn
        for domain, name in enumerate(SIZES):
            assert before[domain] == len(found[name])
        for batch_drawn in draw(drawer, 3):
            for domain, name in enumerate(SIZES):
                found[name] += ids_of([batch_drawn], domain)
                assert_prefix_of_order(found[name], name)
        state = drawer.state_dict()


def assert_prefix_of_order(
    found: list[int], name: str, sizes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """``found`` are the first of the domain's order, and within an epoch none is missing or there twice."""
    order = DomainOrders({name: (sizes or SIZES)[name]}, seed=7, shuffle_block=SHUFFLE_BLOCK)
    expected = order.sample_ids(np.zeros(len(found), dtype=np.int64), np.arange(len(found)))
    assert sorted(found) == sorted(expected.tolist())
    often = np.bincount(found, minlength=int(order.totals[0]))
    epochs = len(found) // int(order.totals[0])
    assert often.min() >= epochs
    assert often.max() <= epochs + (len(found) % int(order.totals[0]) > 0)


# Joins, copies, and any schedule


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


@dataclass
class Event:
    """What happens before a batch."""

    weights: dict[str, float] | None = None
    joins: dict[str, list[int]] = field(default_factory=dict)
    crash: int | None = None  # batches that are lost: resume from the state that many batches ago


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[Event]]:
    """Domains at the start, and up to 25 events; a weight of 0 is a leave, a later one a return."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    first = {f"d{i}": draw(sizes) for i in range(draw(st.integers(1, 4)))}
    names, events = [*first], [Event()]
    for _ in range(draw(st.integers(1, 25))):
        event = Event()
        if draw(st.integers(0, 5)) == 0:
            event.joins = {f"d{len(names) + i}": draw(sizes) for i in range(draw(st.integers(1, 2)))}
            names += event.joins
        if draw(st.booleans()):
            event.weights = dict(zip(names, draw(mixtures(len(names))).tolist(), strict=True))
        if draw(st.integers(0, 3)) == 0:
            event.crash = draw(st.integers(0, 6))
        events.append(event)
    return first, events


@given(schedules(), st.integers(1, 12), st.booleans(), st.sampled_from([1, 6, SHUFFLE_BLOCK]))
@settings(deadline=None, max_examples=60)
def test_any_schedule_equals_the_uninterrupted_run(
    schedule: tuple[dict[str, list[int]], list[Event]], batch: int, ahead: bool, block: int
) -> None:
    first, events = schedule
    sizes = {name: shards for event in [Event(joins=first), *events] for name, shards in event.joins.items()}
    start = {"d0": 1.0}
    whole = Run(first, start, batch, block)
    for event in events:
        whole.step(event)
    parts = Run(first, start, batch, block)
    number, crashes = 0, [event.crash for event in events]
    while number < len(events):
        lost, crashes[number] = crashes[number], None
        if lost is not None:
            number = max(0, number - lost)
            parts = parts.resumed(number)
        if ahead:
            draw(parts.drawer.copy(), 2)
        parts.step(events[number])
        number += 1
    assert parts.batches == whole.batches
    for domain, name in enumerate(whole.drawer.names):
        found = ids_of(whole.batches, domain)
        order = DomainOrders({name: sizes[name]}, seed=7, shuffle_block=block)
        expected = order.sample_ids(np.zeros(len(found), dtype=np.int64), np.arange(len(found)))
        assert sorted(found) == sorted(expected.tolist())


class Run:
    """A sampler, what it drew, and what a new process would start it from before each batch."""

    def __init__(
        self, sizes: dict[str, list[int]], weights: dict[str, float], batch: int, block: int
    ) -> None:
        self.drawer = sampler(sizes, weights, batch, shuffle_block=block)
        self.sizes, self.batch, self.block = dict(sizes), batch, block
        self.batches: list[Batch] = []
        self.starts = [self.start()]

    def step(self, event: Event) -> None:
        if event.joins:
            self.drawer.add_domains(event.joins)
            self.sizes |= event.joins
        if event.weights:
            self.drawer.set_weights(event.weights)
        before = self.drawer.position
        self.batches += draw(self.drawer, 1)
        self.check_boundary(before)
        self.starts.append(self.start())

    def start(self) -> tuple[str, dict[str, list[int]], dict[str, float]]:
        weights = dict(zip(self.drawer.names, self.drawer.weights.tolist(), strict=True))
        return json.dumps(self.drawer.state_dict()), dict(self.sizes), weights

    def check_boundary(self, before: Position) -> None:
        """Within one sample of the target, plus what was settled; and no repeat or loss within an epoch."""
        after, domains = self.drawer.position, len(self.sizes)
        taken, moved = after.drawn - before.drawn, after.settled - before.settled
        assert taken.tolist() == np.bincount(self.batches[-1][0], minlength=domains).tolist()
        assert taken.sum() == self.batch
        lag = before.lag + self.batch * self.drawer.weights + moved - taken
        np.testing.assert_allclose(after.lag, lag, atol=1e-9)
        assert np.abs(lag).max() <= 1 + 1e-9
        assert abs(math.fsum(moved)) < 1e-9
        for domain, sizes in enumerate(self.sizes.values()):
            often = np.bincount(ids_of(self.batches, domain), minlength=sum(sizes))
            assert len(often) == sum(sizes)
            assert often.max() - often.min() <= 1

    def resumed(self, number: int) -> "Run":
        """What a new process goes on with from before batch ``number``."""
        state, sizes, weights = self.starts[number]
        other = Run(sizes, weights, self.batch, self.block)
        other.drawer.load_state_dict(json.loads(state))
        other.batches, other.starts = self.batches[:number], self.starts[: number + 1]
        return other


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


def test_two_warnings_before_the_run_stops(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [10], "b": [100]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 1})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 4)
        assert caplog.messages == []
        draw(drawer, 1)
        assert caplog.messages == [
            "domain a is used up, at 10 of the 10 samples that its max_epochs allows: the next batch with it "
            "stops the run"
        ]


def test_warned_once_at_nine_tenths_and_once_at_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    drawer = sampler({"a": [40], "b": [400]}, {"a": 0.5, "b": 0.5}, max_epochs={"a": 0.5})
    with caplog.at_level(logging.WARNING):
        draw(drawer, 8)
        assert caplog.messages == []
        position = drawer.position
        draw(drawer, 1)  # 18 of 20
        drawer.position = position
        draw(drawer, 1)
        assert caplog.messages == [
            "domain a has drawn 18 of the 20 samples that its max_epochs allows: the run stops when they are "
            "used up"
        ]
        draw(drawer, 1)
    assert len(caplog.messages) == 2
    assert "domain a is used up" in caplog.messages[1]


def test_an_exhausted_domain_leaves_the_mixture(caplog: pytest.LogCaptureFixture) -> None:
    """By hand: 2 of a, 1 of b, 1 of c a batch; of a's 5 samples one is left, fewer than a batch takes."""
    sizes, weights = {"a": [10], "b": [100], "c": [100]}, {"a": 0.5, "b": 0.25, "c": 0.25}
    drawer = sampler(sizes, weights, max_epochs={"a": 0.5}, on_exhausted="renormalize")
    with caplog.at_level(logging.WARNING):
        draw(drawer, 2)
        assert drawer.position.drawn.tolist() == [4, 2, 2]
        assert caplog.messages == []
        draw(drawer, 2)
    assert drawer.position.drawn.tolist() == [4, 6, 6]
    assert drawer.effective_weights.tolist() == [0, 0.5, 0.5]
    assert drawer.weights.tolist() == [0.5, 0.25, 0.25]
    assert caplog.messages == [
        "domain a is used up, at 4 of the 5 samples that its max_epochs allows: it leaves the mixture and "
        "the other weights grow"
    ]
    drawer.set_weights({"a": 0.25, "b": 0.5, "c": 0.25})  # one a batch, which it still has
    draw(drawer, 1)
    assert drawer.position.drawn.tolist() == [5, 8, 7]
    assert drawer.effective_weights.tolist() == [0.25, 0.5, 0.25]


def test_what_an_exhausted_domain_was_owed_goes_to_the_others() -> None:
    drawer = sampler(
        {"a": [1], "b": [50], "c": [50]},
        {"a": 0.4, "b": 0.3, "c": 0.3},
        batch=2,
        max_epochs={"a": 1},
        on_exhausted="renormalize",
    )
    draw(drawer, 1)
    # owed .8, .6, .6: the first two to be complete are a, and of the equal ones b
    np.testing.assert_allclose(drawer.position.lag, [-0.2, -0.4, 0.6], atol=1e-12)
    draw(drawer, 1)
    # a's -.2 is taken off c's .6; then owed -.4 + 1 and .4 + 1
    assert drawer.position.drawn.tolist() == [1, 2, 1 + 0]
    np.testing.assert_allclose(drawer.position.settled, [0.2, 0, -0.2], atol=1e-12)


def test_the_last_domain_to_be_used_up_stops_the_run() -> None:
    drawer = sampler(
        {"a": [6], "b": [6], "c": [60]},
        {"a": 0.5, "b": 0.5},
        max_epochs={"a": 1, "b": 1},
        on_exhausted="renormalize",
    )
    draw(drawer, 3)
    position = drawer.position
    with pytest.raises(
        UserError, match="domain a, the last with a weight, is used up: max_epochs allows 6 samples"
    ):
        drawer.draw()
    assert drawer.position is position
    drawer.set_weights({"a": 0.5, "c": 0.5})
    assert ids_of(draw(drawer, 1), 2)


def test_a_domain_that_left_near_its_cap_does_not_stop_the_run() -> None:
    """It weighs 0, and half a sample that it is owed cannot be drawn: the others get it."""
    drawer = sampler({"a": [1], "b": [50]}, {"a": 0.5, "b": 0.5}, batch=1, max_epochs={"a": 1})
    drawer.position = Position(3, np.array([1, 2]), np.array([1.0, -1.0]), np.zeros(2))
    drawer.set_weights({"b": 1.0})
    draw(drawer, 1)
    assert drawer.position.drawn.tolist() == [1, 3]
    assert drawer.position.lag.tolist() == [0, 0]


@given(
    schedules(), st.integers(1, 9), st.lists(st.floats(0.3, 3), min_size=4, max_size=4), st.integers(0, 25)
)
@settings(deadline=None, max_examples=60)
def test_caps_hold_and_resumes_are_exact_when_domains_run_out(
    schedule: tuple[dict[str, list[int]], list[Event]], batch: int, epochs: list[float], crash: int
) -> None:
    sizes, events = schedule
    caps = dict(zip(sizes, epochs, strict=False))
    options = {"batch": batch, "max_epochs": caps, "on_exhausted": "renormalize"}
    whole, parts = sampler(sizes, {"d0": 1.0}, **options), sampler(sizes, {"d0": 1.0}, **options)
    allowed = np.array([math.floor(caps[name] * sum(sizes[name]) + 1e-9) for name in sizes])
    for number, event in enumerate(events):
        weights = {name: (event.weights or {}).get(name, 0) for name in sizes}
        if sum(weights.values()) > 0:
            total = sum(weights.values())
            for one in (whole, parts):
                one.set_weights({name: weight / total for name, weight in weights.items()})
        if number == crash:
            state, current = (
                through_json(parts.state_dict()),
                dict(zip(sizes, parts.weights.tolist(), strict=True)),
            )
            parts = sampler(sizes, current, **options)
            parts.load_state_dict(state)
        before = whole.position
        try:
            drawn = draw(whole, 1)
        except UserError:
            with pytest.raises(UserError, match="the last with a weight"):
                parts.draw()
            left = (allowed - before.drawn)[whole.weights > 0]
            assert left.min() < batch
            assert whole.position is before
            return
        assert draw(parts, 1) == drawn
        after, effective = whole.position, whole.effective_weights
        assert np.array_equal(effective, parts.effective_weights)
        assert (after.drawn <= allowed).all()
        assert after.drawn.sum() == batch * after.batches
        assert abs(math.fsum(effective) - 1) < 1e-9
        taken, moved = after.drawn - before.drawn, after.settled - before.settled
        lag = before.lag + batch * effective + moved - taken
        assert np.abs(lag).max() <= 1 + 1e-6
        out = (whole.weights > 0) & (effective == 0)
        assert (taken[out] == 0).all()
        assert (after.lag[out] == 0).all()
        kept = whole.weights * ~out
        np.testing.assert_allclose(effective, kept / kept.sum(), rtol=1e-12)


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


def test_max_epochs_of_an_unknown_domain_or_no_number() -> None:
    with pytest.raises(UserError, match="max_epochs: 'x' is none"):
        sampler(SIZES, MIXES[0], max_epochs={"x": 1})
    with pytest.raises(UserError, match="max_epochs: a is nan"):
        sampler(SIZES, MIXES[0], max_epochs={"a": math.nan})
