import hashlib
import json
import math
import string
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.data import sampler_state
from opmix_dist.data.sampler import MixtureSampler, Position, settle
from opmix_dist.data.sampler_state import _pack, name_hashes
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
@settings(deadline=None, max_examples=40)
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
