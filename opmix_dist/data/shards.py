"""Random access to the MDS shards of one split of one domain.

StreamingDataset is not used: its constructor makes collectives and shared memory, and refuses a folder that
another live process reads, while here trainers and pool read the same shards. Its MDS reader decodes them.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from opmix_dist.bounded import read_bounded, require_ordinary
from opmix_dist.data.mds import import_streaming
from opmix_dist.data.samples import HASH, INDEX_FILE, Sample, columns_fault
from opmix_dist.data.store import TOUCH_INTERVAL_S, ShardStore, StoredFile, file_hash, one_line, size_of
from opmix_dist.errors import UserError

MAX_INDEX_BYTES = 1 << 30
OPEN_READERS = 256
# Times that a shard is fetched again when other processes' fetches have pushed it out before it was read.
READ_ATTEMPTS = 20


# Of what decodes shards, once: it takes seconds. Who forks readers calls it before, so that they need not.
import_reader = functools.cache(import_streaming)


class _File(BaseModel):
    # no path, so that it stays in the folder; and what a cache counts and removes, see ShardStore
    basename: str = Field(pattern=r"^shard\.[A-Za-z0-9_.-]*mds(\.zstd)?$")
    bytes: int = Field(ge=1, lt=1 << 32)  # a shard addresses its samples by 32 bits
    hashes: dict[str, str] = {}


class _Shard(BaseModel):
    version: Literal[2]
    format: Literal["mds"]
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    samples: int = Field(ge=1, lt=1 << 32)
    compression: str | None
    raw_data: _File
    zip_data: _File | None

    def stored_file(self) -> StoredFile:
        raw, zipped = self.raw_data, self.zip_data
        return StoredFile(
            raw_name=raw.basename,
            raw_bytes=raw.bytes,
            raw_hash=raw.hashes.get(HASH),
            zip_name=zipped.basename if zipped else None,
            zip_bytes=zipped.bytes if zipped else 0,
            zip_hash=zipped.hashes.get(HASH) if zipped else None,
        )


class _Index(BaseModel):
    """The part of ``index.json`` that is relied upon; checked before any file it names is opened."""

    version: Literal[2]
    shards: list[_Shard] = Field(min_length=1)


class ShardedSplit:
    """The samples of one split, by number, in the order in which they were written.

    A shard is fetched or decompressed when a sample of it is first read, and its file is opened for each
    read, so that processes share no handle. Pickling keeps the arguments only.

    Args:
        local: folder with ``index.json`` and the shards; with a store, the place of the split in its cache.
        store: where shards that are not here come from.
        verify: compare each shard with its hash when this object first reads it, whatever was checked before.

    Raises:
        UserError: a missing or damaged index, columns that are none of a sample's (``pkl`` above all), a file
            name that leaves the folder, or a compression other than zstd.
    """

    def __init__(self, local: Path, store: ShardStore | None = None, *, verify: bool = False) -> None:
        self.local, self.store, self.verify = Path(local), store, verify
        self._local = str(self.local)
        index = _read_index(self.local / INDEX_FILE)
        self.files = [shard.stored_file() for shard in index.shards]
        self.shard_sizes = np.array([shard.samples for shard in index.shards], dtype=np.int64)
        self._columns = index.shards[0].column_names, index.shards[0].column_encodings
        self._ends = np.cumsum(self.shard_sizes)
        self.stored_samples = int(self._ends[-1])
        self._ready = np.zeros(len(self.files), dtype=bool)
        self._touched = np.zeros(len(self.files))
        self._readers: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.local, self.store, self.verify)

    @property
    def folder(self) -> str:
        """Relative to the catalogue's root: ``DOMAIN/SPLIT``."""
        return "/".join(self.local.parts[-2:])

    @property
    def stored_bytes(self) -> int:
        """Uncompressed."""
        return sum(file.raw_bytes for file in self.files)

    def bytes_of_block(self, samples: int) -> int:
        """What about ``samples`` samples take, in whole shards; at most the split."""
        per_sample = self.stored_bytes / len(self)
        largest = max(file.raw_bytes for file in self.files)
        return min(self.stored_bytes, int(samples * per_sample) + largest)

    def is_here(self, shard: int) -> bool:
        """Whether the shard's uncompressed file is on this machine, going by its size."""
        return self.size_on_disk(shard) == self.files[shard].raw_bytes

    def size_on_disk(self, shard: int) -> int:
        """Bytes of the shard's uncompressed file; -1 when it is not here."""
        # no Path: looking ahead asks for every shard that a batch needs, and stat takes less than making one
        return size_of(f"{self._local}/{self.files[shard].raw_name}")

    def read(self, sample_id: int) -> Sample:
        """One sample.

        Raises:
            IndexError: ``sample_id`` is not in [0, len).
            UserError: the shard is missing, truncated or damaged; the message names its file.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)} in {self.local}")
        shard, row = self._find(sample_id)
        for _ in range(READ_ATTEMPTS):
            try:
                self._require_here(shard)
                return Sample.from_row(self._reader(shard).get_item(row))
            except FileNotFoundError:  # removed from the cache since
                self._ready[shard] = False
            except (OSError, ValueError, IndexError, KeyError, MemoryError) as error:
                raise self._damaged(shard, f"sample {row} cannot be read ({one_line(error)})") from None
        raise self._damaged(
            shard, f"was removed {READ_ATTEMPTS} times before it was read: is the cache too small?"
        )

    def _find(self, sample_id: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's number in it."""
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, int(sample_id - (self._ends[shard] - self.shard_sizes[shard]))

    def _require_here(self, shard: int) -> None:
        """Have the shard's file here, whole."""
        if not self._ready[shard]:
            self._fetch(shard)
            if self.verify:
                self._require_hash(shard)
            self._ready[shard] = True
        if self.store is not None and time.monotonic() - self._touched[shard] > TOUCH_INTERVAL_S:
            self._touched[shard] = time.monotonic()
            self.store.touch(self.local / self.files[shard].raw_name)

    def _fetch(self, shard: int) -> None:
        if self.is_here(shard):
            return
        file, store = self.files[shard], self.store
        if store is None and file.zip_name is not None:  # decompressed beside its compressed file
            self._require_ordinary(shard, file.zip_name)
            root = self.local.parent.parent
            store = ShardStore(str(root), root, attempts=1)
        if store is not None:
            store.fetch(self.folder, file)
            return
        there = self.size_on_disk(shard)
        what = f"{there} of {file.raw_bytes} bytes are there" if there >= 0 else "is missing"
        raise self._damaged(shard, what)

    def _require_ordinary(self, shard: int, name: str) -> None:
        try:
            require_ordinary(self.local / name)
        except OSError as error:
            raise self._damaged(shard, f"{name} cannot be read ({error.strerror})") from None

    def _require_hash(self, shard: int) -> None:
        """Of the file on disk; one from a store is fetched anew before it is given up."""
        file = self.files[shard]
        path, wanted = self.local / file.raw_name, file.raw_hash
        if wanted is None:
            raise self._damaged(shard, "has no hash in its index, which data.verify_shards: always needs")
        if file_hash(path) != wanted and self.store is not None:
            path.unlink(missing_ok=True)
            self._fetch(shard)
        if file_hash(path) != wanted:
            raise self._damaged(shard, "its hash is not the one of its index: flipped bytes")

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            self._readers[shard] = _mds_reader(self.local, self.files[shard], *self._columns)
            if len(self._readers) > OPEN_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def _damaged(self, shard: int, what: str) -> UserError:
        path = self.local / self.files[shard].raw_name
        return UserError(f"shard {path}: {what}; copy it again or prepare the domain again")


def _reopened(local: Path, store: ShardStore | None, verify: bool) -> ShardedSplit:
    return ShardedSplit(local, store, verify=verify)


def _mds_reader(local: Path, file: StoredFile, names: Sequence[str], encodings: Sequence[str]) -> Any:
    import_reader()
    from streaming.base.format.base.reader import FileInfo
    from streaming.base.format.mds.encodings import get_mds_encoded_size
    from streaming.base.format.mds.reader import MDSReader

    return MDSReader(
        dirname=str(local),
        split=None,
        column_encodings=list(encodings),
        column_names=list(names),
        column_sizes=[get_mds_encoded_size(encoding) for encoding in encodings],
        compression=None,
        hashes=[],
        raw_data=FileInfo(basename=file.raw_name, bytes=file.raw_bytes, hashes={}),
        samples=1 << 32,  # IndexError is left to the file: its offsets tell how many there are
        size_limit=None,
        zip_data=None,
    )


def _read_index(path: Path) -> _Index:
    try:
        index = _Index.model_validate_json(read_bounded(path, MAX_INDEX_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare the domain again") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: `{key}`: {first['msg']}; prepare the domain again") from None
    if fault := _index_fault(index):
        raise UserError(f"{path}: {fault}; make shards with `opmix prepare`, which also reads foreign MDS")
    return index


def _index_fault(index: _Index) -> str | None:
    first = index.shards[0]
    if len(first.column_names) != len(first.column_encodings):
        return "its columns have names and encodings of different number"
    for shard in index.shards:
        if (shard.column_names, shard.column_encodings) != (first.column_names, first.column_encodings):
            return "its shards have different columns"
        if (shard.zip_data is None) != (shard.compression is None) or shard.compression not in (None, "zstd"):
            return f"compression {shard.compression} is neither none nor zstd"
    return columns_fault(first.column_names, first.column_encodings)
