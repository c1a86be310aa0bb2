"""The process that fetches ahead: it never holds its loader up, and stays within the cache."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opmix_dist.data.fetcher import MAX_STARTS, Fetcher
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore
from tests.data.shard_files import write_split
from tests.s3_server import s3_server

pytestmark = pytest.mark.usefixtures("streaming")
SHARDS = 20


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one domain of 20 shards of 5 samples."""
    root = tmp_path_factory.mktemp("remote")
    write_split(root / "web" / "train", 3, 5 * SHARDS, per_shard=5)
    return root


def opened(remote: Path, url: str, cache: Path, **options: object) -> ShardedSplit:
    local = cache / "web" / "train"
    local.mkdir(parents=True)
    shutil.copy(remote / "web" / "train" / "index.json", local)
    return ShardedSplit(local, ShardStore(url, cache, **options))


@pytest.fixture
def split(remote: Path, tmp_path: Path) -> ShardedSplit:
    return opened(remote, str(remote), tmp_path / "cache")


@pytest.fixture
def fetcher(split: ShardedSplit) -> Iterator[Fetcher]:
    fetcher = Fetcher([split], threads=2)
    yield fetcher
    fetcher.close()


def pid(fetcher: Fetcher) -> int:
    assert fetcher._process is not None
    return fetcher._process.pid


def shard_bytes(remote: Path) -> int:
    return (remote / "web/train/shard.00000.mds").stat().st_size


def here(split: ShardedSplit) -> list[int]:
    return [shard for shard in range(SHARDS) if split.is_here(shard)]


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_fetcher_that_stands_still_holds_nobody_up(fetcher: Fetcher, split: ShardedSplit) -> None:
    """Wishes of some MB, far more than a pipe holds; only the last one counts when it goes on."""
    fetcher.want([(0, 0)])
    wait_until(lambda: here(split) == [0])
    os.kill(pid(fetcher), signal.SIGSTOP)

    def ask() -> None:
        for _ in range(4):
            fetcher.want([(0, 1)] * 200_000)
        fetcher.want([(0, 7)])

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(20)
    assert not asking.is_alive()
    os.kill(pid(fetcher), signal.SIGCONT)

    def goes_on() -> bool:
        fetcher.want([(0, 7)])  # as the loader does with each batch
        return split.is_here(7)

    wait_until(goes_on)


def test_closing_is_no_dying(fetcher: Fetcher, split: ShardedSplit) -> None:
    """However often it was closed, a later wish starts it again."""
    for _ in range(MAX_STARTS):
        fetcher.want([(0, 3)])
        fetcher.close()
    fetcher.want([(0, 4)])
    wait_until(lambda: split.is_here(4))


def test_an_interrupt_from_the_keyboard_is_left_to_the_loader(fetcher: Fetcher, split: ShardedSplit) -> None:
    fetcher.want([(0, 0)])
    wait_until(lambda: split.is_here(0))
    first = pid(fetcher)
    os.kill(first, signal.SIGINT)
    fetcher.want([(0, 1)])
    wait_until(lambda: split.is_here(1))
    assert pid(fetcher) == first


def test_a_cache_that_holds_less_than_is_wanted_is_filled_once(remote: Path, tmp_path: Path) -> None:
    """Else what is wanted would push out what is wanted, over and over, while nobody reads."""
    with s3_server() as server:
        url, limit = server.upload(remote, "data"), 6 * shard_bytes(remote)
        split = opened(remote, url, tmp_path / "cache", limit_bytes=limit)
        server.requests.clear()
        fetcher = Fetcher([split], threads=2)
        fetcher.want([(0, shard) for shard in range(SHARDS)])
        wait_until(lambda: here(split) == [0, 1, 2, 3, 4, 5])
        time.sleep(1.5)  # three of its rounds
        fetcher.close()
        assert sorted(server.shards_requested()) == [f"web/train/shard.{n:05}.mds" for n in range(6)]
        assert len(here(split)) == 6
