"""Shards that lie elsewhere: fetched when needed, checked, kept in a folder of bounded size.

Any fsspec URL or path can be the remote root. Processes of one machine share the cache folder and nothing
else: a lock file for each shard being fetched, sizes from the file system, the time of last use from
modification times. There is no shared memory and no server, so a killed process leaves nothing that stands
in the way.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

from filelock import FileLock, Timeout

from opmix_dist.bounded import open_ordinary
from opmix_dist.errors import UserError

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
FIRST_PAUSE_S = 0.5
TOUCH_INTERVAL_S = 5.0
WAIT_S = 0.02
LOCKS = ".locks"
TEMPORARY_SUFFIX = ".part"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A shard as an index describes it."""

    raw_name: str  # of the uncompressed file, which readers open
    raw_bytes: int
    raw_hash: str | None  # xxh3_128, hexadecimal
    zip_name: str | None = None  # zstd; None: stored uncompressed
    zip_bytes: int = 0
    zip_hash: str | None = None

    @property
    def stored_name(self) -> str:
        return self.zip_name or self.raw_name


class DamagedError(Exception):
    """What was fetched is not what the index describes."""


@dataclass(frozen=True)
class ShardStore:
    """A remote root and its cache on this machine. Holds settings only: processes make their own copies."""

    remote: str
    """fsspec URL, or a path."""
    cache: Path
    """Folder that mirrors the remote's layout."""
    limit_bytes: int | None = None
    """Bound on what lies in the cache, what is being fetched included; None: no bound."""
    check: bool = True
    """Compare hashes of what is fetched with the index."""
    attempts: int = 4
    """Tries before a shard is given up, with growing pauses between them."""
    timeout_s: float = 600.0
    """Seconds for one try, and for waiting until another process has fetched."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> ShardStore:
        return cls(**{**plain, "cache": Path(plain["cache"])})

    def has(self, folder: str, file: StoredFile) -> bool:
        return size_of(self.cache / folder / file.raw_name) == file.raw_bytes

    def fetch(self, folder: str, file: StoredFile) -> None:
        """Have ``cache/folder/raw_name`` there, whole, unless it is; other processes may ask meanwhile.

        Args:
            folder: of the shard, relative to both roots.

        Raises:
            UserError: it could not be fetched within the attempts; names the remote file.
        """
        local = self.cache / folder / file.raw_name
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(local):
                if not self.has(folder, file):
                    self._fetch(f"{self.remote.rstrip('/')}/{folder}/{file.stored_name}", file, local)
        except Timeout:
            raise UserError(
                f"shard {local}: another process has been fetching it for {self.timeout_s:.0f} s; "
                f"look at that process, or raise data.fetch_timeout_s"
            ) from None
        except OSError as error:
            raise UserError(
                f"shard {local}: cannot be written ({error.strerror or error}); mend or move data.cache"
            ) from None

    def touch(self, path: Path) -> None:
        """Note that the shard is in use, so that others are removed before it."""
        try:
            if time.time() - path.stat().st_mtime > TOUCH_INTERVAL_S:
                os.utime(path)
        except OSError:  # removed meanwhile: whoever reads it fetches it again
            pass

    def _fetch(self, url: str, file: StoredFile, local: Path) -> None:
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            with self._temporary(local, file) as out:
                try:
                    within(self.timeout_s, functools.partial(self._copy, url, file, out))
                    with self._room():  # else whoever counts now may find neither name
                        os.replace(out.name, local)
                    return
                except _LocalError as error:
                    raise error.cause from None
                except Exception as error:  # every store's client raises its own
                    reason = one_line(error)
            log.warning("%s: attempt %d of %d failed: %s", url, attempt + 1, self.attempts, reason)
        raise UserError(
            f"shard {local}: {url} cannot be fetched ({reason}); tried {self.attempts} times: restore "
            f"the file or see to the store"
        )

    def _copy(self, url: str, file: StoredFile, out: IO[bytes]) -> None:
        """One try; what ``out`` holds is on the disk and checked afterwards."""
        import fsspec

        with fsspec.open(url, "rb") as source, _local_errors():
            stored = _Checked(source, file.zip_bytes if file.zip_name else file.raw_bytes)
            raw = _unzipped(stored) if file.zip_name else stored.blocks()
            digest, written = _new_digest(), 0
            for block in raw:
                written += len(block)
                if written > file.raw_bytes:
                    raise DamagedError(f"more than the {file.raw_bytes} bytes of its index")
                out.write(block)
                digest.update(block)
            stored.require_whole(file.zip_hash if self.check and file.zip_name else None)
            if written != file.raw_bytes:
                raise DamagedError(f"{written} of {file.raw_bytes} bytes")
            if self.check and file.raw_hash and digest.hexdigest() != file.raw_hash:
                raise DamagedError("its hash is not the one of its index: flipped bytes")
            out.flush()
            os.fsync(out.fileno())

    def _lock(self, path: Path, timeout_s: float | None = None) -> FileLock:
        """Of one file of the cache, whether it is there or not."""
        locks = self.cache / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        name = ".".join(path.relative_to(self.cache).parts)
        return FileLock(locks / f"{name}.lock", timeout=self.timeout_s if timeout_s is None else timeout_s)

    def _room(self) -> FileLock:
        """Held while bytes are counted, taken or given back; never while anything is waited for."""
        return self._lock(self.cache / "room")

    @contextmanager
    def _temporary(self, local: Path, file: StoredFile) -> Iterator[IO[bytes]]:
        """A temporary file of the final size, made after enough old shards were removed.

        It is open while it is needed: a try that hung and wakes up after the next one began cannot write into
        that one's file.
        """
        temporary = local.with_name(local.name + TEMPORARY_SUFFIX)
        with ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            self._reserve(temporary, file.raw_bytes)
            yield stack.enter_context(open(temporary, "r+b"))

    def _reserve(self, temporary: Path, wanted: int) -> None:
        """Create the file once ``wanted`` bytes fit; wait for fetches under way where need be."""
        limit = self.limit_bytes
        if limit is not None and wanted > limit:
            raise UserError(f"data.cache_limit of {limit} bytes holds no shard of {wanted} bytes: raise it")
        deadline = time.monotonic() + self.timeout_s
        while True:
            with self._room():
                temporary.unlink(missing_ok=True)  # what a killed fetch left: the shard's lock is ours
                if limit is None or self._evict(limit - wanted) <= limit - wanted:
                    with open(temporary, "wb") as out:
                        out.truncate(wanted)  # counts as taken from now on, whoever else looks
                    return
            if time.monotonic() > deadline:
                raise UserError(
                    f"data.cache_limit of {limit} bytes is taken up by shards that have been fetched for "
                    f"{self.timeout_s:.0f} s: see to the store, or raise data.fetch_timeout_s"
                )
            time.sleep(WAIT_S)

    def _evict(self, allowed: int) -> int:
        """Remove shards, those unused for longest first, until ``allowed`` bytes are left; how many are.

        A reader that has one open goes on reading it; one that opens it later fetches it again.
        """
        entries = list(self._files())
        taken = sum(size for _, size, _ in entries)
        if taken <= allowed:
            return taken
        for _, size, name in sorted(entries):
            if taken <= allowed:
                break
            path = Path(name)
            if path.suffix != TEMPORARY_SUFFIX or self._is_left_over(path):
                path.unlink(missing_ok=True)
                taken -= size
        return taken

    def _is_left_over(self, temporary: Path) -> bool:
        """Whether nobody fetches into the file any more."""
        try:
            with self._lock(temporary.with_suffix(""), timeout_s=0):
                return True
        except Timeout:
            return False

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, bytes and path of what lies in ``*/*/shard.*``.

        Each fetch into a cache with a limit looks at all of it; scandir takes two thirds of Path.glob's time.
        """
        for domain in _folders(self.cache):
            for split in _folders(domain.path):
                for entry in _entries(split.path):
                    with suppress(OSError):  # gone since
                        if entry.name.startswith("shard."):
                            stat = entry.stat()
                            yield stat.st_mtime, stat.st_size, entry.path


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing when it is gone."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _folders(folder: Path | str) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def size_of(path: Path | str) -> int:
    """Bytes of a file; -1 when there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def file_hash(path: Path) -> str:
    """xxh3_128 of a file, hexadecimal."""
    digest = _new_digest()
    with open(open_ordinary(path), "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def within(timeout_s: float, work: Callable[[], None]) -> None:
    """Run ``work()`` and raise what it raises, or TimeoutError when it takes longer.

    A client that hangs cannot be stopped from outside; its thread is left behind and dies with the process.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not done.done():
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")
    done.result()


class _LocalError(Exception):
    """An OSError of this machine's disk, which no other attempt mends."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


class _RemoteError(Exception):
    """What the store's client raised."""


@contextmanager
def _local_errors() -> Iterator[None]:
    """Tell an OSError of our own file, such as a full disk, from one of the store's client."""
    try:
        yield
    except OSError as error:
        raise _LocalError(error) from None


class _Checked:
    """Reads a stored file in blocks, and knows in the end whether it was whole."""

    def __init__(self, file: IO[bytes], expected: int) -> None:
        self._file, self._expected = file, expected
        self._digest, self._seen = _new_digest(), 0

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        try:
            block = self._file.read(size)
        except OSError as error:  # not one of our own disk
            raise _RemoteError(one_line(error)) from error
        self._digest.update(block)
        self._seen += len(block)
        return block

    def blocks(self) -> Iterator[bytes]:
        while block := self.read():
            yield block

    def require_whole(self, expected_hash: str | None) -> None:
        while self.read():  # what a decompressor had no use for
            pass
        if self._seen != self._expected:
            raise DamagedError(f"{self._seen} of {self._expected} bytes")
        if expected_hash and self._digest.hexdigest() != expected_hash:
            raise DamagedError("its hash is not the one of its index: flipped bytes")


def _unzipped(stored: _Checked) -> Iterator[bytes]:
    import zstandard

    try:
        source = cast("IO[bytes]", stored)  # of a file, only `read` is asked for
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader:
            while block := reader.read(BLOCK_BYTES):
                yield block
    except zstandard.ZstdError as error:
        raise DamagedError(f"it cannot be decompressed ({one_line(error)})") from None


def _new_digest() -> Any:
    """Imported here, as a configuration names this module and needs no hash."""
    import xxhash

    return xxhash.xxh3_128()
