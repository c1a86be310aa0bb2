"""A replay store: which samples are kept, and that they alone are read."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader, eval_batches
from opmix_dist.data.replay import ReplaySplit, kept_of_shards
from opmix_dist.errors import UserError
from tests.data.shard_files import write_catalogue

SIZES = {"web": 40, "code": 25, "maths": 16}
KEPT = {"web": 7, "code": 25}
WEIGHTS = {"web": 0.5, "code": 0.25, "maths": 0.25}


@pytest.fixture(scope="module")
def catalogue(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_catalogue(tmp_path_factory.mktemp("data"), SIZES)


def loader(catalogue: Catalogue, **more: object) -> MixtureLoader:
    arguments: dict = {"global_batch_size": 8, "rank": 0, "world_size": 1, "seed": 5}
    return MixtureLoader(catalogue, WEIGHTS, **(arguments | more))


def drawn(loader: MixtureLoader, batches: int) -> list[tuple[int, int]]:
    """(domain, sample), as the tokens tell them."""
    rows = [row for _ in range(batches) for row in next(loader).batch.tokens.tolist()]
    return [(row[0], row[1]) for row in rows]


def test_shares_of_shards_by_hand() -> None:
    # marks at every 10 / 4 samples: shards end at 5, 6 and 10
    assert kept_of_shards(np.array([5, 1, 4]), 4, 0).tolist() == [2, 0, 2]
    assert kept_of_shards(np.array([5, 1, 4]), 4, 9).tolist() == [2, 1, 1]
    assert kept_of_shards(np.array([3, 0, 2]), 5, 4).tolist() == [3, 0, 2]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any), st.data())
def test_shares_add_up_and_fit_their_shards(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    samples, start = data.draw(st.integers(1, total)), data.draw(st.integers(0, total - 1))
    kept = kept_of_shards(np.array(sizes), samples, start)
    assert kept.sum() == samples
    exact = np.array(sizes) * samples / total
    assert (np.floor(exact - 1e-9) <= kept).all()
    assert (kept <= np.ceil(exact + 1e-9)).all()
    assert (kept <= sizes).all()


def test_a_choice_is_a_set_of_samples_that_its_seed_decides(catalogue: Catalogue) -> None:
    folder = catalogue.split_dir("web", "train")

    def chosen(seed: int, samples: int = 20) -> list[int]:
        split = ReplaySplit(folder, samples=samples, seed=seed)
        return [int(split.read(i).tokens[1]) for i in range(len(split))]

    found = chosen(1)
    assert len({*found}) == len(found) == 20
    assert found == chosen(1)
    assert {*found} != {*chosen(2)}
    assert sorted(chosen(1, 40)) == list(range(40)) == sorted(chosen(1, 99))
    # each of 40 samples is in a choice of 20 as often as any other: 30 times of 60, 3.9 either way
    counts = Counter(number for seed in range(60) for number in chosen(seed))
    assert all(14 <= counts[number] <= 46 for number in range(40))
    with pytest.raises(IndexError):
        ReplaySplit(folder, samples=20, seed=1).read(20)
    again = pickle.loads(pickle.dumps(ReplaySplit(folder, samples=20, seed=1)))
    assert [int(again.read(i).tokens[1]) for i in range(20)] == found


def test_only_what_is_kept_is_read_and_counted(catalogue: Catalogue) -> None:
    store = catalogue.keeping(KEPT, seed=3)
    assert store.samples("train").tolist() == [7, 25, 16]
    assert store.samples("eval").tolist() == catalogue.samples("eval").tolist()
    replayed = loader(store)
    rows = drawn(replayed, 14)  # 112 rows: 56, 28 and 28
    webs = Counter(number for domain, number in rows if domain == 0)
    assert {*webs.values()} == {8}
    assert len(webs) == 7
    assert {number for domain, number in rows if domain == 1} == set(range(25))
    np.testing.assert_allclose(replayed.epochs(), [8, 28 / 25, 28 / 16])
    with pytest.raises(UserError, match="domain web is used up: max_epochs allows 14 samples of its 7"):
        drawn(loader(store, max_epochs={"web": 2.0}), 14)


def test_a_resume_goes_on_exactly_also_with_workers(catalogue: Catalogue) -> None:
    store = catalogue.keeping(KEPT, seed=3)
    whole = loader(store)
    expected = drawn(whole, 9)
    first = loader(store)
    assert drawn(first, 4) == expected[:32]
    resumed = loader(store, num_workers=1)
    resumed.load_state_dict(first.state_dict())
    assert drawn(resumed, 5) == expected[32:]
    resumed.close()
    with pytest.raises(UserError, match="has other shards than when"):
        loader(catalogue).load_state_dict(first.state_dict())


def test_held_out_samples_stay(catalogue: Catalogue) -> None:
    kept = eval_batches(catalogue.keeping(KEPT, seed=3), samples_per_domain=3, seed=0)
    assert kept.batch.tokens.equal(eval_batches(catalogue, samples_per_domain=3, seed=0).batch.tokens)


def test_a_domain_that_is_not_there(catalogue: Catalogue) -> None:
    with pytest.raises(UserError, match="data.replay_samples names `books`"):
        catalogue.keeping({"books": 3}, seed=0)


def test_a_domain_that_joins_leaves_the_store_as_it_was(catalogue: Catalogue, tmp_path: Path) -> None:
    part = Catalogue.open(catalogue.root, ["web", "code"]).keeping(KEPT, seed=3)
    joined = MixtureLoader(part, {"web": 0.5, "code": 0.5}, global_batch_size=8, rank=0, world_size=1, seed=5)
    joined.set_weights(WEIGHTS)
    assert len({number for domain, number in drawn(joined, 14) if domain == 0}) == 7
