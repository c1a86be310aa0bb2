"""Fetching and evicting shards, and what may go wrong with it."""

import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from opmix_dist.data import store as store_module
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore, StoredFile
from opmix_dist.errors import UserError
from tests.data.shard_files import cache_bytes, flip_a_byte, sample_tokens, write_split
from tests.helpers import ROOT
from tests.s3_server import S3Server, s3_server

pytestmark = pytest.mark.usefixtures("streaming")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A root with one domain of 20 samples in three shards, none of them compressed."""
    write_split(tmp_path / "remote" / "web" / "train", 3, 20)
    return tmp_path / "remote"


def open_split(
    remote: Path | str, cache: Path, index_from: Path | None = None, **options: object
) -> ShardedSplit:
    """The split web/train through a cache, with its index mirrored."""
    local = cache / "web" / "train"
    local.mkdir(parents=True, exist_ok=True)
    shutil.copy((index_from or Path(remote)) / "web" / "train" / "index.json", local)
    return ShardedSplit(local, ShardStore(str(remote), cache, **options))


def read_all(split: ShardedSplit) -> list[list[int]]:
    return [split.read(number).tokens.tolist() for number in range(len(split))]


EXPECTED = [sample_tokens(3, number).tolist() for number in range(20)]


def shards(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/*/shard.*")}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_shard_comes_when_it_is_read(tmp_path: Path, compression: str) -> None:
    write_split(tmp_path / "remote" / "web" / "train", 3, 20, compression=compression)
    split = open_split(tmp_path / "remote", tmp_path / "cache")
    assert shards(tmp_path / "cache") == set()
    assert split.read(19).tokens.tolist() == EXPECTED[19]
    assert shards(tmp_path / "cache") == {"shard.00002.mds"}
    assert read_all(split) == EXPECTED


def test_half_a_shard_is_fetched_again(remote: Path, tmp_path: Path) -> None:
    split = open_split(remote, tmp_path / "cache")
    (tmp_path / "cache/web/train/shard.00000.mds").write_bytes(b"half")
    (tmp_path / "cache/web/train/shard.00001.mds.part").write_bytes(b"left by a kill")
    assert read_all(split) == EXPECTED
    assert not list(tmp_path.glob("**/*.part"))


def test_what_is_not_there_is_named(remote: Path, tmp_path: Path) -> None:
    split = open_split(remote, tmp_path / "cache", attempts=2)
    (remote / "web/train/shard.00001.mds").unlink()
    split.read(0)
    with pytest.raises(UserError, match=r"shard \S*shard.00001.mds: \S*remote/\S*shard.00001.mds cannot be"):
        split.read(7)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_flipped_bytes_at_the_remote_are_one_error(tmp_path: Path, compression: str) -> None:
    write_split(tmp_path / "remote/web/train", 3, 20, compression=compression)
    flip_a_byte(next((tmp_path / "remote/web/train").glob("shard.00001.*")))
    split = open_split(tmp_path / "remote", tmp_path / "cache", attempts=2)
    with pytest.raises(UserError, match=r"shard.00001.mds: .*(flipped bytes|decompressed).*tried 2 times"):
        read_all(split)
    assert shards(tmp_path / "cache") == {"shard.00000.mds"}


def test_flipped_bytes_in_the_cache_are_fetched_again_when_every_read_is_verified(
    remote: Path, tmp_path: Path
) -> None:
    read_all(open_split(remote, tmp_path / "cache"))
    flip_a_byte(tmp_path / "cache/web/train/shard.00001.mds")
    unverified = open_split(remote, tmp_path / "cache")
    assert read_all(unverified) != EXPECTED
    assert read_all(ShardedSplit(unverified.local, unverified.store, verify=True)) == EXPECTED


def test_the_limit_is_kept_and_the_oldest_goes_first(remote: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bytes_of = {path.name: path.stat().st_size for path in (remote / "web/train").glob("shard.*")}
    split = open_split(remote, cache, limit_bytes=2 * max(bytes_of.values()))
    split.read(0), split.read(7)
    os.utime(cache / "web/train/shard.00000.mds", (1, 1))
    split.read(14)
    assert shards(cache) == {"shard.00001.mds", "shard.00002.mds"}
    for _ in range(2):
        assert read_all(split) == EXPECTED  # what another fetch removed comes back
        assert sum(bytes_of[name] for name in shards(cache)) <= 2 * max(bytes_of.values())


def test_a_limit_below_one_shard_is_refused(remote: Path, tmp_path: Path) -> None:
    split = open_split(remote, tmp_path / "cache", limit_bytes=100)
    with pytest.raises(UserError, match=r"data.cache_limit of 100 bytes holds no shard"):
        split.read(0)


def test_use_keeps_a_shard_from_being_the_oldest(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    split = open_split(remote, cache, limit_bytes=2 * (remote / "web/train/shard.00000.mds").stat().st_size)
    split.read(0), split.read(7)
    for number in (0, 1):
        os.utime(cache / f"web/train/shard.0000{number}.mds", (1 + number, 1 + number))
    monkeypatch.setattr("opmix_dist.data.shards.TOUCH_INTERVAL_S", 0.0)
    split.read(0)
    split.read(14)
    assert shards(cache) == {"shard.00000.mds", "shard.00002.mds"}


def _read_many_times(cache: Path, remote: Path, limit: int, seed: int) -> None:
    split = ShardedSplit(cache / "web/train", ShardStore(str(remote), cache, limit_bytes=limit))
    order = [(number * (7 + 2 * seed) + seed) % 20 for number in range(200)]
    assert [split.read(number).tokens.tolist() for number in order] == [EXPECTED[number] for number in order]


def test_processes_share_a_cache_that_is_too_small_for_them(remote: Path, tmp_path: Path) -> None:
    """They push each other's shards out; every sample read is right none the less, and the limit is kept."""
    cache, limit = tmp_path / "cache", 2 * (remote / "web/train/shard.00000.mds").stat().st_size
    open_split(remote, cache)  # copies the index, which none of them may find half written
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_many_times, args=(cache, remote, limit, n)) for n in (1, 2, 3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert cache_bytes(cache) <= limit


def test_a_fetch_that_ends_while_another_counts_is_counted(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one ends between the second's listing of the cache and its look at the sizes."""
    cache, size = tmp_path / "cache", (remote / "web/train/shard.00000.mds").stat().st_size
    split = open_split(remote, cache, limit_bytes=size)
    copied, counting, most = threading.Event(), threading.Event(), 0
    copy, entries = ShardStore._copy, store_module._entries

    def copy_and_wait(store: ShardStore, url: str, file: StoredFile, out: IO[bytes]) -> None:
        nonlocal most
        copy(store, url, file, out)
        most = max(most, cache_bytes(cache))
        if "00000" in url:
            copied.set()
            assert counting.wait(20)

    def list_and_let_it_end(folder: Path | str) -> list[os.DirEntry[str]]:
        found = entries(folder)
        if any(entry.name.endswith(".part") for entry in found) and not counting.is_set():
            counting.set()
            first.join(0.5)
        return found

    monkeypatch.setattr(ShardStore, "_copy", copy_and_wait)
    first = threading.Thread(target=split.read, args=(0,))
    first.start()
    assert copied.wait(20)
    monkeypatch.setattr(store_module, "_entries", list_and_let_it_end)
    assert ShardedSplit(split.local, split.store).read(7).tokens.tolist() == EXPECTED[7]
    first.join()
    assert counting.is_set()
    assert most <= size


def test_what_a_killed_fetch_left_makes_room(remote: Path, tmp_path: Path) -> None:
    size = (remote / "web/train/shard.00000.mds").stat().st_size
    split = open_split(remote, tmp_path / "cache", limit_bytes=2 * size)
    for number in (1, 2):
        (tmp_path / f"cache/web/train/shard.0000{number}.mds.part").write_bytes(bytes(size))
    assert split.read(0).tokens.tolist() == EXPECTED[0]
    assert cache_bytes(tmp_path / "cache") <= 2 * size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named(small_disk: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "remote/web/train", 3, 3000, per_shard=3000)
    split = open_split(tmp_path / "remote", small_disk)
    with pytest.raises(UserError, match=r"shard.00000.mds: cannot be written \(No space left") as caught:
        split.read(0)
    assert "mend or move data.cache" in str(caught.value)
    assert shards(small_disk) == set()


def test_a_write_that_the_kernel_refuses_is_named(remote: Path, tmp_path: Path) -> None:
    """Where nothing can be mounted: a bound on file sizes fails the write itself."""
    split = open_split(remote, tmp_path / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match=r"shard.00000.mds: cannot be written \(File too large"):
            split.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert read_all(split) == EXPECTED


def test_a_cache_that_cannot_be_made_is_named(remote: Path, tmp_path: Path) -> None:
    file = ShardedSplit(remote / "web/train").files[0]
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"shard.00000.mds: cannot be written .*data.cache"):
        ShardStore(str(remote), tmp_path / "cache").fetch("web/train", file)


def test_a_try_that_was_given_up_cannot_write_any_more(remote: Path, tmp_path: Path) -> None:
    """It may wake up while, or after, another one fetches the same shard."""
    file = ShardedSplit(remote / "web/train").files[0]
    store, local = ShardStore(str(remote), tmp_path / "cache"), tmp_path / "cache/shard.00000.mds"
    local.parent.mkdir()
    with store._temporary(local, file) as given_up:
        pass
    with store._temporary(local, file):
        with pytest.raises(ValueError, match="closed file"):
            store._copy(f"{remote}/web/train/shard.00000.mds", file, given_up)
        assert not any((tmp_path / "cache/shard.00000.mds.part").read_bytes())


LEFT_BEHIND = """
from opmix_dist.data.mds import import_streaming
import_streaming()
import os, signal, sys
from streaming import StreamingDataset
dataset = StreamingDataset(local=sys.argv[1], batch_size=1, shuffle=False)
next(iter(dataset))
print("reading", flush=True)
os.killpg(0, signal.SIGKILL)  # as a launcher or a scheduler does: the tidying helper goes too
"""


def streamings_shared_memory() -> set[str]:
    """Names such as ``000000_locals``; other processes have semaphores and more in that folder."""
    return {name for name in os.listdir("/dev/shm") if re.fullmatch(r"\d{6}_\w+", name)}


def test_shared_memory_of_a_killed_reader_is_in_nobodys_way(remote: Path, tmp_path: Path) -> None:
    """A StreamingDataset that is killed leaves shared memory; nothing here uses any, ours or others'."""
    local = remote / "web/train"
    before = streamings_shared_memory()
    killed = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND, str(local)], capture_output=True, cwd=ROOT, start_new_session=True
    )
    assert killed.stdout == b"reading\n", killed.stderr.decode()
    left = streamings_shared_memory() - before
    assert left, "the killed reader left nothing: this test shows nothing any more"
    try:
        assert read_all(ShardedSplit(local)) == EXPECTED
        assert read_all(open_split(remote, tmp_path / "cache")) == EXPECTED
        assert streamings_shared_memory() - before == left
    finally:
        for name in left:
            os.unlink(f"/dev/shm/{name}")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def on_s3(server: S3Server, remote: Path) -> Iterator[str]:
    server.requests.clear()
    yield server.upload(remote, "data")
    server.fault, server.latency_s = lambda path: None, 0.0


def times(count: int, status: int, then: Callable[[], None] = lambda: None) -> Callable[[str], int | None]:
    """Answer the first ``count`` requests for the second shard with ``status``."""
    left = [count]

    def fault(path: str) -> int | None:
        if "shard.00001" not in path or not left[0]:
            return None
        left[0] -= 1
        then()
        return status

    return fault


def test_a_store_that_answers_500_for_a_while(
    server: S3Server, on_s3: str, remote: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # the client of S3 tries on its own before it tells us; more than that, and we try again
    server.fault = times(8, 500)
    split = open_split(on_s3, tmp_path / "cache", remote)
    with caplog.at_level(logging.WARNING):
        assert read_all(split) == EXPECTED
    asked = server.shards_requested().count("web/train/shard.00001.mds")
    assert asked >= 9
    assert "attempt 1 of 4 failed" in caplog.text


def test_a_store_that_answers_500_for_good_is_one_error(
    server: S3Server, on_s3: str, remote: Path, tmp_path: Path
) -> None:
    server.fault = times(1_000, 500)
    split = open_split(on_s3, tmp_path / "cache", remote, attempts=2)
    with pytest.raises(
        UserError, match=r"shard.00001.mds: s3://\S*shard.00001.mds cannot be fetched .* tried 2"
    ) as caught:
        read_all(split)
    assert "\n" not in str(caught.value)


def test_a_store_that_hangs_for_a_while(
    server: S3Server, on_s3: str, remote: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = times(1, 500, then=lambda: time.sleep(6))
    split = open_split(on_s3, tmp_path / "cache", remote, timeout_s=2.0)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert read_all(split) == EXPECTED
    assert time.monotonic() - began < 6
    assert "no answer within 2 s" in caplog.text


def test_a_missing_bucket_or_object_is_named(
    server: S3Server, on_s3: str, remote: Path, tmp_path: Path
) -> None:
    split = open_split("s3://no-such-bucket/data", tmp_path / "cache", remote, attempts=1)
    with pytest.raises(UserError, match=r"s3://no-such-bucket/data/\S*shard.00000.mds cannot be fetched"):
        split.read(0)
