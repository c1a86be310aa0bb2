import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opmix_dist.data.batch import TokenBatch, collate
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import LoadedBatch, MixtureLoader, ReadOptions, eval_batches
from opmix_dist.data.samples import Sample
from opmix_dist.errors import UserError
from tests.data.shard_files import VOCAB, T, sample_tokens, uint16, uint32, write_catalogue, write_domain

pytestmark = pytest.mark.usefixtures("streaming")

Make = Callable[..., MixtureLoader]
SIZES = {"web": 40, "code": 25, "maths": 16}
WEIGHTS = {"web": 0.5, "code": 0.3, "maths": 0.2}
CODE_ONLY = {"web": 0.0, "code": 1.0, "maths": 0.0}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_catalogue(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture
def make(catalogue: Catalogue) -> Iterator[Make]:
    """Makes loaders of 8 samples a batch and closes them."""
    made: list[MixtureLoader] = []

    def build(weights: dict[str, float] = WEIGHTS, **changed: object) -> MixtureLoader:
        arguments: dict[str, Any] = {"global_batch_size": 8, "rank": 0, "world_size": 1, "seed": 5}
        made.append(MixtureLoader(catalogue, weights, **(arguments | changed)))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def samples(batch: LoadedBatch) -> list[tuple[int, int]]:
    """(domain, sample) of each row, as the tokens tell it."""
    tokens = batch.batch.tokens
    assert tokens.dtype == batch.domain_ids.dtype == torch.int64
    assert tokens[:, 0].tolist() == batch.domain_ids.tolist()
    assert torch.equal(batch.batch.loss_mask, TokenBatch.of_tokens(tokens).loss_mask)
    for row in tokens:
        np.testing.assert_array_equal(row, sample_tokens(int(row[0]), int(row[1])))
    return [(int(row[0]), int(row[1])) for row in tokens]


def take(loader: MixtureLoader, batches: int) -> list[list[tuple[int, int]]]:
    return [samples(next(loader)) for _ in range(batches)]


def test_workers_do_not_change_the_order(make: Make) -> None:
    expected = take(make(), 12)
    for workers in (1, 2):
        assert take(make(num_workers=workers), 12) == expected


def test_ranks_together_hand_out_the_global_batch(make: Make) -> None:
    expected = take(make(), 6)
    for world in (2, 4):
        ranks = [take(make(rank=rank, world_size=world), 6) for rank in range(world)]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == expected


def test_numbers_and_counts(make: Make) -> None:
    loader = make()
    assert [next(loader).number for _ in range(5)] == list(range(5))
    np.testing.assert_array_equal(loader.counts(), [20, 12, 8])  # 40 samples at 0.5, 0.3, 0.2
    np.testing.assert_allclose(loader.epochs(), [20 / 40, 12 / 25, 8 / 16])


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_act_on_the_very_next_batch(make: Make, workers: int) -> None:
    loader = make(num_workers=workers, prefetch_batches=3)
    before = take(loader, 2)
    loader.set_weights(CODE_ONLY)
    after = take(loader, 1)[0]
    # 16 samples drawn of 16 owed (8, 4.8, 3.2): at most a begun unit of web or maths comes before code
    assert sum(domain == 1 for domain, _ in after) >= 7
    drawn = [pair for batch in [*before, after] for pair in batch]
    assert len(set(drawn)) == len(drawn)


def test_change_with_workers_is_the_change_without(make: Make) -> None:
    histories = []
    for workers in (0, 2):
        loader = make(num_workers=workers)
        history = take(loader, 3)
        for weights in (CODE_ONLY, WEIGHTS, CODE_ONLY, WEIGHTS):
            loader.set_weights(weights)
            history += take(loader, 2)
        histories.append(history)
    assert histories[0] == histories[1]


def test_weights_that_are_no_mixture_change_nothing(make: Make) -> None:
    loader, untouched = make(num_workers=1), make()
    take(loader, 2)
    take(untouched, 2)
    with pytest.raises(UserError, match=r"weights sum to 1\.1"):
        loader.set_weights({"web": 0.6, "code": 0.5})
    assert take(loader, 3) == take(untouched, 3)


def test_state_is_that_of_the_last_batch_handed_out(make: Make) -> None:
    ahead, at_hand = make(num_workers=2, prefetch_batches=4), make()
    for _ in range(3):
        next(ahead), next(at_hand)
        assert ahead.state_dict() == at_hand.state_dict()
    assert ahead.counts().sum() == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_twice_on_other_world_sizes(make: Make, workers: int) -> None:
    expected = take(make(), 9)
    first = make(num_workers=workers)
    take(first, 2)
    second = make(num_workers=workers, world_size=2, rank=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 3) == [batch[4:] for batch in expected[2:5]]
    third = make(num_workers=workers)
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert next(third).number == 5
    assert take(third, 3) == expected[6:]


def test_going_back_in_the_same_loader(make: Make) -> None:
    loader = make(num_workers=2)
    state = loader.state_dict()
    first = take(loader, 4)
    loader.load_state_dict(state)
    assert take(loader, 4) == first


def test_global_random_state_is_left_alone(make: Make) -> None:
    """Else dropout would depend on how often the workers were started."""
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = make(num_workers=workers)
        next(loader)
        loader.set_weights(CODE_ONLY)
        next(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_close_ends_the_workers_and_a_later_batch_follows_on(make: Make) -> None:
    expected = take(make(), 5)
    loader = make(num_workers=2)
    started = take(loader, 3)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    assert started + take(loader, 2) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_used_up_domain_stops_after_the_batches_before(make: Make, workers: int) -> None:
    # maths has 16 samples, 1.6 a batch: 10 batches are one epoch
    loader = make(num_workers=workers, prefetch_batches=4, max_epochs={"maths": 1})
    assert len({pair for batch in take(loader, 10) for pair in batch if pair[0] == 2}) == 16
    for _ in range(2):
        with pytest.raises(UserError, match="domain maths is used up: max_epochs allows 16 samples"):
            next(loader)
    loader.set_weights(CODE_ONLY)
    assert next(loader).number == 10


@pytest.fixture
def spoilt(catalogue: Catalogue, tmp_path: Path) -> Catalogue:
    root = Path(shutil.copytree(catalogue.root, tmp_path / "data"))
    return Catalogue(root, catalogue.names, catalogue.domains)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_shard_is_named_in_one_line(spoilt: Catalogue, workers: int) -> None:
    shard = spoilt.root / "code" / "train" / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    loader = MixtureLoader(
        spoilt, CODE_ONLY, global_batch_size=25, rank=0, world_size=1, seed=5, num_workers=workers
    )
    with pytest.raises(UserError, match=r"shard \S*code/train/shard.00000.mds") as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    shard.write_bytes(whole)
    assert sorted(samples(next(loader))) == [(1, sample) for sample in range(25)]
    loader.close()


def test_a_killed_reader_is_told_in_one_line_and_replaced(make: Make) -> None:
    expected = take(make(), 6)
    loader = make(num_workers=2)
    assert take(loader, 2) == expected[:2]
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # their deaths raise nothing by themselves, in the middle of whatever goes on
    with pytest.raises(UserError, match=r"DataLoader worker \(pid.*data.num_workers") as caught:
        take(loader, 8)
    assert "\n" not in str(caught.value)
    handed_out = int(loader.counts().sum()) // 8
    assert take(loader, 6 - handed_out) == expected[handed_out:]


def test_shards_that_contradict_the_catalogue(spoilt: Catalogue) -> None:
    shutil.rmtree(spoilt.root / "code" / "train")
    shutil.copytree(spoilt.root / "web" / "train", spoilt.root / "code" / "train")
    with pytest.raises(UserError, match=r"domain code: .* has 40 samples, its domain.json says 25"):
        MixtureLoader(spoilt, WEIGHTS, global_batch_size=8, rank=0, world_size=1, seed=5)


def test_token_beyond_the_vocabulary_is_named(spoilt: Catalogue) -> None:
    shard = spoilt.root / "code" / "eval" / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(sample_tokens(1, 0).tobytes(), sample_tokens(1, VOCAB).tobytes()))
    with pytest.raises(UserError, match=rf"domain code: sample 0 .* has token {VOCAB}, beyond"):
        eval_batches(spoilt, samples_per_domain=9, seed=1)


def test_batch_that_does_not_divide(make: Make) -> None:
    with pytest.raises(UserError, match="8 samples does not divide over 3 ranks"):
        make(world_size=3)


def test_eval_samples_are_fixed_and_nested(catalogue: Catalogue) -> None:
    few, more = (eval_batches(catalogue, samples_per_domain=n, seed=1) for n in (3, 5))
    other = eval_batches(catalogue, samples_per_domain=3, seed=2)
    assert few.batch.tokens.shape == (9, T)
    assert few.domain_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] == few.batch.tokens[:, 0].tolist()
    assert torch.equal(few.batch.tokens, more.batch.tokens[[0, 1, 2, 5, 6, 7, 10, 11, 12]])
    assert torch.equal(few.batch.tokens, eval_batches(catalogue, samples_per_domain=3, seed=1).batch.tokens)
    assert not torch.equal(few.batch.tokens, other.batch.tokens)


def test_skipped_eval_samples_are_those_of_the_other_caller(catalogue: Catalogue) -> None:
    first, all_five = (eval_batches(catalogue, samples_per_domain=n, seed=1) for n in (2, 5))
    rest = eval_batches(catalogue, samples_per_domain=3, seed=1, skip=2)
    assert torch.equal(rest.batch.tokens, all_five.batch.tokens[[2, 3, 4, 7, 8, 9, 12, 13, 14]])
    assert not {row.numpy().tobytes() for row in first.batch.tokens} & {
        row.numpy().tobytes() for row in rest.batch.tokens
    }
    with pytest.raises(UserError, match="has 9 held-out samples and 9 are set aside for searches"):
        eval_batches(catalogue, samples_per_domain=3, seed=1, skip=9)


def test_eval_samples_do_not_depend_on_other_domains(catalogue: Catalogue) -> None:
    alone = Catalogue(catalogue.root, ("code",), {"code": catalogue.domains["code"]})
    full = eval_batches(catalogue, samples_per_domain=4, seed=1)
    assert torch.equal(eval_batches(alone, samples_per_domain=4, seed=1).batch.tokens, full.batch.tokens[4:8])


def test_small_eval_split_gives_what_it_has(catalogue: Catalogue) -> None:
    found = eval_batches(catalogue, samples_per_domain=100, seed=1)
    assert found.domain_ids.bincount().tolist() == [9, 9, 9]
    assert len({(int(row[0]), int(row[1])) for row in found.batch.tokens}) == 27


# --- documents, padding, masks ---


def test_batch_by_hand() -> None:
    """T = 6: documents of 2 and 4 tokens; one of 3 and padding; a chat in which two turns are learnt."""
    rows = [
        Sample(uint16([1, 2, 3, 4, 5, 6]), uint32([2, 6])),
        Sample(uint16([7, 8, 9]), uint32([3])),
        Sample(uint16([1, 2, 3, 4, 5]), uint32([5]), uint32([[0, 2], [3, 5]]).reshape(-1, 2)),
    ]
    plain, masked = (collate(rows, 6, mask_documents=masked) for masked in (False, True))
    assert plain.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0], [1, 2, 3, 4, 5, 0]]
    assert plain.loss_mask.int().tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]]
    assert plain.position_ids is None
    assert masked.loss_mask.int().tolist() == [[0, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]]
    assert masked.position_ids is not None
    assert masked.position_ids.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert plain.targets.tolist() == [5, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_document_masks_come_with_the_samples(make: Make, workers: int) -> None:
    loader = make(num_workers=workers, reading=ReadOptions(mask_documents=True))
    batch = next(loader).batch
    half = list(range(T // 2))
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [half + half] * 8
    assert batch.loss_mask[0].tolist() == [False, *[True] * (T // 2 - 1)] * 2


# --- joins, caps, other batch sizes ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_domain_joins_while_the_loader_runs(spoilt: Catalogue, workers: int) -> None:
    loader = MixtureLoader(
        spoilt, WEIGHTS, global_batch_size=8, rank=0, world_size=1, seed=5, num_workers=workers
    )
    before = take(loader, 3)
    joined = {"web": 0.25, "code": 0.25, "maths": 0.0, "chat": 0.5}
    with pytest.raises(UserError, match="no domain 'chat'"):
        loader.set_weights(joined)
    write_domain(spoilt.root, "chat", 3, 30)
    loader.set_weights(joined)
    after = take(loader, 4)
    assert loader.names == ("web", "code", "maths", "chat")
    drawn = list(chain(*before, *after))
    assert len(set(drawn)) == len(drawn)
    assert loader.counts()[3] == 16  # 32 samples at a half
    resumed = MixtureLoader(
        Catalogue.open(spoilt.root, ["chat", "web", "code"]),
        {"chat": 1.0},
        global_batch_size=8,
        rank=0,
        world_size=1,
        seed=5,
    )
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    loader.set_weights({"chat": 1.0})
    expected = [[sample for domain, sample in batch if domain == 3] for batch in take(loader, 1)]
    found = [[int(row[1]) for row in next(resumed).batch.tokens if row[0] == 3]]
    assert found == expected
    loader.close()


def test_going_on_without_a_domain_that_is_used_up(make: Make) -> None:
    # maths has 16 samples, 1.6 a batch
    loader = make(max_epochs={"maths": 1}, on_exhausted="renormalize")
    drawn = take(loader, 20)
    assert len({pair for batch in drawn for pair in batch if pair[0] == 2}) == 16
    assert all(len(batch) == 8 for batch in drawn)
    later = [domain for batch in drawn[12:] for domain, _ in batch]
    assert later.count(0) == 40  # 64 samples at 5/8
    assert later.count(1) == 24


def test_a_domain_joins_with_a_cap(spoilt: Catalogue) -> None:
    loader = MixtureLoader(spoilt, WEIGHTS, global_batch_size=8, rank=0, world_size=1, seed=5)
    write_domain(spoilt.root, "chat", 3, 20)
    loader.set_weights({"chat": 1.0}, max_epochs={"chat": 1})
    take(loader, 2)
    with pytest.raises(UserError, match="domain chat is used up: max_epochs allows 20 samples"):
        next(loader)


def test_another_global_batch_goes_on_without_loss_or_repeat(make: Make) -> None:
    first = make()
    drawn = list(chain(*take(first, 3)))
    second = make(global_batch_size=12, world_size=3, rank=0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    whole = make(global_batch_size=12)
    whole.load_state_dict(json.loads(json.dumps(first.state_dict())))
    drawn += list(chain(*take(whole, 2)))
    assert take(second, 2) == [drawn[24:28], drawn[36:40]]
    for domain, name in enumerate(SIZES):
        found = [sample for d, sample in drawn if d == domain]
        alone = make({name: 1.0}, global_batch_size=len(found))
        assert sorted(found) == sorted(sample for _, sample in take(alone, 1)[0])


def test_ranks_of_one_replica_read_the_same(make: Make) -> None:
    """Tensor- and pipeline-parallel ranks pass their replica's rank: 2 replicas of 2 ranks each."""
    batches = [take(make(rank=rank // 2, world_size=2, num_workers=rank % 2), 4) for rank in range(4)]
    assert batches[0] == batches[1]
    assert batches[2] == batches[3]
    assert not set(chain(*batches[0])) & set(chain(*batches[2]))
