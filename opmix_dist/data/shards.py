"""Random access to the MDS shards of one split of one domain.

StreamingDataset is not used: its constructor makes collectives and shared memory, and refuses a folder that
another live process reads, while here trainers and pool read the same shards. Its parts, Stream (download,
decompress) and the MDS reader, do the work.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, Field, ValidationError

from opmix_dist.data.mds import import_streaming
from opmix_dist.errors import UserError

COLUMN = "tokens"
MAX_INDEX_BYTES = 256 << 20
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_S = 600.0


class _File(BaseModel):
    basename: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="no path: stays in the folder")
    bytes: int = Field(ge=1)


class _Shard(BaseModel):
    version: Literal[2]
    format: Literal["mds"]
    column_names: tuple[Literal["tokens"]]
    column_encodings: tuple[str]
    samples: int = Field(ge=1)
    raw_data: _File
    zip_data: _File | None


class _Index(BaseModel):
    """The part of ``index.json`` that is relied upon; checked before any file it names is opened."""

    version: Literal[2]
    shards: list[_Shard] = Field(min_length=1)


class ShardedSplit:
    """The samples of one split, by number, in the order in which they were written.

    A shard is fetched when a sample of it is first read, and its file is opened for each read, so that
    processes share no handle. Pickling keeps the two paths only.

    Args:
        local: folder with ``index.json`` and the shards, or the cache of ``remote``.
        remote: folder or URL (``s3://``, ``gs://``, ...) that the shards are downloaded from when needed.

    Raises:
        UserError: a missing or damaged index, a column other than ``tokens`` of uint16 or uint32, a file
            name that leaves the folder, or shards of several sequence lengths.
    """

    def __init__(self, local: Path, remote: str | None = None) -> None:
        self.local, self.remote = Path(local), remote
        self._stream = _open_stream(self.local, remote)
        index_file = self.local / "index.json"
        if remote is not None and not index_file.exists():
            with _only_this_process(self.local):
                _load_readers(self._stream, index_file)  # downloads the index
        index = _read_index(index_file)
        self.sequence_length = _sequence_length(index, index_file)
        self._readers = _load_readers(self._stream, index_file)
        self.shard_sizes = np.array([shard.samples for shard in index.shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._fetched = np.zeros(len(self.shard_sizes), dtype=bool)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[type[ShardedSplit], tuple[Path, str | None]]:
        return ShardedSplit, (self.local, self.remote)

    def read(self, sample_id: int) -> np.ndarray:
        """Token ids [T] of one sample, uint16 or uint32.

        Raises:
            IndexError: ``sample_id`` is not in [0, len).
            UserError: the shard is missing, truncated or damaged; the message names its file.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)} in {self.local}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        if not self._fetched[shard]:
            self._fetch(shard)
        row = int(sample_id - (self._ends[shard] - self.shard_sizes[shard]))
        try:
            tokens: np.ndarray = self._readers[shard].get_item(row)[COLUMN]
        except (OSError, ValueError, IndexError, MemoryError) as error:
            raise self._damaged(shard, f"sample {row} cannot be read ({_one_line(error)})") from None
        return tokens

    def _fetch(self, shard: int) -> None:
        """Have the shard's file here, whole."""
        reader = self._readers[shard]
        path = self.local / reader.raw_data.basename
        if _size(path) != reader.raw_data.bytes and (self.remote is not None or reader.zip_data is not None):
            with _only_this_process(self.local):
                self._download(shard, path)
        if _size(path) != reader.raw_data.bytes:
            raise self._damaged(shard, f"{_size(path)} of {reader.raw_data.bytes} bytes are there")
        self._fetched[shard] = True

    def _download(self, shard: int, path: Path) -> None:
        """Fetch and decompress under the lock, unless another process just has."""
        reader = self._readers[shard]
        if _size(path) == reader.raw_data.bytes:
            return
        path.unlink(missing_ok=True)  # what a killed download or decompression left
        try:
            self._stream.prepare_shard(reader)
        except Exception as error:  # every store's client raises its own
            raise self._damaged(shard, f"it cannot be fetched ({_one_line(error)})") from error

    def _damaged(self, shard: int, what: str) -> UserError:
        path = self.local / self._readers[shard].raw_data.basename
        return UserError(f"shard {path}: {what}; copy it again or prepare the domain again")


def _open_stream(local: Path, remote: str | None) -> Any:
    import_streaming()
    from streaming.base import Stream

    if remote is not None:
        local.mkdir(parents=True, exist_ok=True)
    return Stream(
        local=str(local),
        remote=remote,
        download_retry=DOWNLOAD_ATTEMPTS,
        download_timeout=DOWNLOAD_TIMEOUT_S,
        keep_zip=False,
    )


def _load_readers(stream: Any, index_file: Path) -> list[Any]:
    """One reader per shard; a world of one process, so that no collective is made."""
    from streaming.base.world import World

    try:
        readers: list[Any] = stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
    except Exception as error:  # of the format, the file system, or the remote store's client
        raise UserError(f"{index_file} cannot be read: {_one_line(error)}") from error
    return readers


def _read_index(path: Path) -> _Index:
    size = _size(path)
    if size > MAX_INDEX_BYTES:
        raise UserError(f"{path} is larger than {MAX_INDEX_BYTES} bytes, which no such index is")
    try:
        return _Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare the domain again") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: `{key}`: {first['msg']}; prepare the domain again") from None


def _sequence_length(index: _Index, path: Path) -> int:
    """T of all shards; refuses every encoding but token ids, `pkl` above all."""
    encodings = sorted({shard.column_encodings[0] for shard in index.shards})
    found = [re.fullmatch(r"ndarray:uint(?:16|32):([1-9][0-9]{0,7})", encoding) for encoding in encodings]
    lengths = {int(match[1]) for match in found if match}
    if None in found or len(lengths) != 1:
        raise UserError(
            f"{path}: column `{COLUMN}` is {', '.join(encodings)}, not ndarray:uint16:T or ndarray:uint32:T "
            f"of one length T; prepare the domain again"
        )
    return lengths.pop()


def _only_this_process(folder: Path) -> FileLock:
    return FileLock(folder / ".fetch.lock")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
