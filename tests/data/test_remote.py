"""A catalogue in an object store: mirrored, read, fetched ahead in the order of need."""

import itertools
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader, ReadOptions, eval_batches
from opmix_dist.data.lookahead import Lookahead
from opmix_dist.data.remote import open_catalogue
from opmix_dist.data.sampler import MixtureSampler
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore
from opmix_dist.errors import UserError
from tests.data.shard_files import cache_bytes, write_catalogue, write_domain
from tests.s3_server import S3Server, s3_server

pytestmark = pytest.mark.usefixtures("streaming")

SIZES = {"web": 60, "code": 40}
WEIGHTS = {"web": 0.5, "code": 0.5}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return write_catalogue(tmp_path_factory.mktemp("data"), SIZES, per_shard=5, compression="zstd")


@pytest.fixture
def url(server: S3Server, written: Catalogue, request: pytest.FixtureRequest) -> str:
    """Each test has a root of its own: stores keep listings in memory."""
    server.fault, server.latency_s = lambda path: None, 0.0
    url = server.upload(written.root, f"data-{abs(hash(request.node.name))}")
    server.requests.clear()
    return url


def loader(catalogue: Catalogue, **changed: object) -> MixtureLoader:
    arguments = {"global_batch_size": 4, "rank": 0, "world_size": 1, "seed": 5, "shuffle_block": 10}
    return MixtureLoader(catalogue, WEIGHTS, **(arguments | changed))


def take(loader: MixtureLoader, batches: int) -> list[list[list[int]]]:
    return [next(loader).batch.tokens.tolist() for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 4])
def test_a_store_hands_out_what_the_folder_does(
    url: str, written: Catalogue, tmp_path: Path, workers: int, ahead: int
) -> None:
    store = ShardStore(url, tmp_path / "cache")
    remote = loader(
        open_catalogue(url, list(SIZES), store), num_workers=workers, reading=ReadOptions(fetch_ahead=ahead)
    )
    assert take(remote, 30) == take(loader(written), 30)
    remote.close()
    found = eval_batches(open_catalogue(url, list(SIZES), store), samples_per_domain=3, seed=1)
    assert (
        found.batch.tokens.tolist()
        == eval_batches(written, samples_per_domain=3, seed=1).batch.tokens.tolist()
    )


def test_shards_are_fetched_before_they_are_needed_and_in_that_order(
    server: S3Server, url: str, written: Catalogue, tmp_path: Path
) -> None:
    """One batch is read; the fetcher then goes on by itself, as the sampler will."""
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    order = order_of_need(written)
    remote = loader(catalogue, reading=ReadOptions(fetch_ahead=6, fetch_threads=1))
    next(remote)
    wait_until(lambda: len(shards_here(tmp_path / "cache")) >= 6)
    remote.close()
    asked = list(dict.fromkeys(name.split(".mds")[0] for name in server.shards_requested()))
    # the first ones may also be asked for by the reader, beside the fetcher
    assert set(asked[:3]) == set(order[:3])
    assert asked[3:6] == order[3:6]
    assert len(order) == 12 + 8


def test_no_shard_is_fetched_twice_while_the_cache_has_room(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    """Readers and fetcher ask for the same shards at the same time."""
    server.latency_s = 0.01
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    remote = loader(catalogue, num_workers=2, reading=ReadOptions(fetch_ahead=8))
    take(remote, 25)
    remote.close()
    asked = server.shards_requested()
    assert len(asked) == len(set(asked)) == 20


def test_new_weights_change_what_is_fetched(
    server: S3Server, url: str, written: Catalogue, tmp_path: Path
) -> None:
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    remote = loader(catalogue, reading=ReadOptions(fetch_ahead=3))
    remote.set_weights({"web": 1.0})
    next(remote)
    wait_until(lambda: len(shards_here(tmp_path / "cache")) >= 3)
    assert not any("/code/" in str(path) for path in shards_here(tmp_path / "cache"))
    remote.set_weights({"code": 1.0})
    next(remote)
    wait_until(lambda: sum("/code/" in str(path) for path in shards_here(tmp_path / "cache")) >= 3)
    remote.close()


def test_a_small_cache_is_kept_small_and_told_of(
    url: str, written: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = ShardedSplit(written.split_dir("web", "train")).files[0].raw_bytes
    limit = 6 * shard
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache", limit_bytes=limit))
    with caplog.at_level(logging.WARNING):
        remote = loader(catalogue, num_workers=1, reading=ReadOptions(fetch_ahead=2, fetch_threads=2))
        assert not caplog.records
        loader(catalogue, shuffle_block=40).close()
    assert "data.cache_limit" in caplog.text
    assert "data.shuffle_block" in caplog.text
    expected = loader(written)
    for _ in range(50):
        assert take(remote, 1) == take(expected, 1)
        assert cache_bytes(tmp_path / "cache") <= limit
    remote.close()


def test_a_killed_fetcher_is_started_again(
    url: str, written: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    remote, expected = loader(catalogue, reading=ReadOptions(fetch_ahead=2)), loader(written)
    assert take(remote, 1) == take(expected, 1)
    fetcher = remote._fetcher
    assert fetcher is not None
    assert fetcher._process is not None
    first = fetcher._process.pid
    os.kill(first, signal.SIGKILL)
    fetcher._process.wait()
    with caplog.at_level(logging.WARNING):
        assert take(remote, 24) == take(expected, 24)
    assert "has died: starting another" in caplog.text
    assert fetcher._process.pid != first
    remote.close()


def test_a_store_that_fails_in_the_fetcher_stops_the_reader_with_one_line(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache", attempts=1))
    server.fault = lambda path: 404 if "code/train/shard.00003" in path else None
    remote = loader(catalogue, num_workers=2, reading=ReadOptions(fetch_ahead=2))
    with pytest.raises(UserError, match=r"code/train/shard.00003\S* cannot be fetched") as caught:
        take(remote, 40)
    assert "\n" not in str(caught.value)
    server.fault = lambda path: None
    take(remote, 1)
    remote.close()


def test_an_alarm_while_a_batch_is_read_loses_none(
    server: S3Server, url: str, written: Catalogue, tmp_path: Path
) -> None:
    """Any exception leaves the loader before the batch that it came in place of."""
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    remote, expected = loader(catalogue, reading=ReadOptions(fetch_ahead=0)), loader(written)
    assert take(remote, 1) == take(expected, 1)
    server.latency_s = 0.5
    handler = signal.signal(signal.SIGALRM, _ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(_Alarm):  # one shard that is not here takes longer
            take(remote, 8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    server.latency_s = 0.0
    number = remote.counts().sum() // 4
    assert next(remote).number == number
    expected.load_state_dict(remote.state_dict())
    assert take(remote, 3) == take(expected, 3)
    assert (next(remote).domain_ids == next(expected).domain_ids).all()


class _Alarm(BaseException):  # as KeyboardInterrupt: no failure of the store
    pass


def _ring(*_: object) -> None:
    raise _Alarm


def test_a_domain_joins_from_the_store(
    server: S3Server, url: str, written: Catalogue, tmp_path: Path
) -> None:
    catalogue = open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache"))
    remote = loader(catalogue)
    take(remote, 2)
    root = Path(shutil.copytree(written.root, tmp_path / "more"))
    write_domain(root, "chat", 7, 20, per_shard=5)
    server.upload(root / "chat", f"{url.rsplit('/', 1)[1]}/chat")
    remote.set_weights({"chat": 1.0})
    tokens = next(remote).batch.tokens
    assert tokens[:, 0].tolist() == [7] * 4
    remote.close()


def test_a_cache_that_cannot_be_made_is_not_blamed_on_the_root(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data.cache \S*file/cache cannot be made \(Not a directory\)"):
        open_catalogue(url, None, ShardStore(url, tmp_path / "file" / "cache"))


def test_all_domains_are_found(url: str, tmp_path: Path) -> None:
    catalogue = open_catalogue(url, None, ShardStore(url, tmp_path / "cache"))
    assert catalogue.names == ("code", "web")
    assert catalogue.load_tokenizer().eos_token_id is not None


def test_a_store_that_hangs_while_descriptions_are_read_is_told(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    server.latency_s = 3.0
    with pytest.raises(UserError, match=r"data.root s3://\S* cannot be read: no answer within 1 s") as caught:
        open_catalogue(url, list(SIZES), ShardStore(url, tmp_path / "cache", timeout_s=1.0))
    assert "\n" not in str(caught.value)


def test_a_second_opening_reads_descriptions_only(server: S3Server, url: str, tmp_path: Path) -> None:
    store = ShardStore(url, tmp_path / "cache")
    open_catalogue(url, list(SIZES), store)
    server.requests.clear()
    open_catalogue(url, list(SIZES), store)
    assert {path.split("/")[-1] for path in server.requests} == {"domain.json"}


def test_a_cache_of_other_data_is_refused(
    server: S3Server, url: str, written: Catalogue, tmp_path: Path
) -> None:
    store = ShardStore(url, tmp_path / "cache")
    open_catalogue(url, list(SIZES), store)
    root = Path(shutil.copytree(written.root, tmp_path / "other"))
    shutil.rmtree(root / "code")
    write_domain(root, "code", 1, 33)
    server.upload(root, url.rsplit("/", 1)[1])
    with pytest.raises(UserError, match=r"caches another version of domain code: delete that folder"):
        open_catalogue(url, list(SIZES), store)


@pytest.mark.parametrize(
    ("root", "domains", "named"),
    [
        ("s3://corpus/nowhere", None, r"data.root s3://corpus/nowhere cannot be read"),
        ("s3://corpus/nowhere", ["web"], r"s3://corpus/nowhere"),
        ("s3://nobody/x", None, r"data.root s3://nobody/x cannot be read"),
        ("nonsense://x/y", None, r"data.root nonsense://x/y cannot be read"),
        ("{url}", ["web", "absent"], r"absent/domain.json does not exist"),
        ("{url}", ["../web"], r"cannot name a domain"),
    ],
)
def test_what_cannot_be_opened_is_named(
    url: str, tmp_path: Path, root: str, domains: list[str] | None, named: str
) -> None:
    root = root.format(url=url)
    with pytest.raises(UserError, match=named) as caught:
        open_catalogue(root, domains, ShardStore(root, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_the_lookahead_names_shards_in_the_order_of_need(written: Catalogue) -> None:
    """No shard is here: it stops at four of them, and tells of what follows when batches have passed."""
    splits = [_Absent(written.split_dir(name, "train")) for name in written.names]
    told: list[list[tuple[int, int]]] = []
    lookahead = Lookahead(sampler_of(written), splits, slice(0, 4), ahead=4, tell=told.append)
    lookahead.step(0)
    order = [(list(SIZES).index(name.split("/")[0]), int(name[-5:])) for name in order_of_need(written)]
    assert told[-1] == order[: len(told[-1])]
    assert 4 <= len(told[-1]) <= 8  # a batch of 4 may bring several at once
    for batch in range(1, 20):
        lookahead.step(batch)
        assert len(told[-1]) < 12
    seen = list(dict.fromkeys(itertools.chain(*told)))
    assert seen == order[: len(seen)]
    assert len(seen) > 10


def test_of_shards_that_are_here_the_lookahead_names_the_nearest(
    written: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of thousands each time would take longer to tell than a batch takes; missing ones are named."""
    monkeypatch.setattr("opmix_dist.data.lookahead.NEAR_SHARDS", 3)
    splits = [_OneAbsent(written.split_dir(name, "train")) for name in written.names]
    told: list[list[tuple[int, int]]] = []
    lookahead = Lookahead(sampler_of(written), splits, slice(0, 4), ahead=4, tell=told.append)
    lookahead.step(0)
    order = [(list(SIZES).index(name.split("/")[0]), int(name[-5:])) for name in order_of_need(written)]
    first_missing = order.index((0, 7))
    assert first_missing > 3
    for batch in range(1, 4):  # of 8 batches each
        lookahead.step(batch)
    assert (0, 7) in told[-1]
    assert all(pairs[:3] == order[order.index(pairs[0]) :][:3] for pairs in told)
    assert all(set(pairs[3:]) <= {(0, 7), (1, 7)} for pairs in told)


class _OneAbsent(ShardedSplit):
    def is_here(self, shard: int) -> bool:
        return shard != 7


class _Absent(ShardedSplit):
    def is_here(self, shard: int) -> bool:
        return False


def sampler_of(catalogue: Catalogue) -> MixtureSampler:
    sizes = {name: ShardedSplit(catalogue.split_dir(name, "train")).shard_sizes for name in catalogue.names}
    return MixtureSampler(sizes, WEIGHTS, global_batch_size=4, seed=5, shuffle_block=10)


def order_of_need(catalogue: Catalogue) -> list[str]:
    """Each shard once, as the sampler comes to it: ``web/train/shard.00007``."""
    sampler, found = sampler_of(catalogue), []
    for _ in range(60):
        for domain, sample in zip(*sampler.draw(), strict=True):
            found.append(f"{catalogue.names[domain]}/train/shard.{sample // 5:05}")
    return list(dict.fromkeys(found))


def shards_here(cache: Path) -> list[Path]:
    return list(cache.glob("*/*/shard.*.mds"))


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
