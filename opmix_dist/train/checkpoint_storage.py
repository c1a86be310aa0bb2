"""How DCP's files are written and read here: hashed as they are written, and read without a trusted pickle.

DCP's ``.metadata`` is a pickle, read as checkpoint_metadata.py has it. A tensor's file has a pickle too,
which torch reads with ``weights_only``; what it stands for is bounded here. Entries that are no tensors are
not read.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageReaderTransforms,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from opmix_dist.bounded import read_bounded, require_ordinary
from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.exchange.manifest import FileDigest, HashingStream, Manifest, hash_file
from opmix_dist.faults.points import point
from opmix_dist.train.checkpoint_metadata import load_metadata
from opmix_dist.train.pickle_bounds import check_bounds

MAX_METADATA_BYTES = 1 << 30
"""Of DCP's index, some 250 bytes for each part of a tensor: thousands of tensors on hundreds of ranks."""
MAX_TENSOR_PICKLE_BYTES = 1 << 16
"""Of a tensor's kind, shape and strides, some 150 bytes."""


class HashingWriter(FileSystemWriter):
    """DCP's writer of one checkpoint, which also makes its manifest: each rank hashes what it writes, and its
    share of the files that were in the folder before.

    manifest: of all files, on the coordinator once the save has ended.
    """

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self.folder, self.world = folder, world
        self.fs = self._hashing = _HashingFileSystem()
        self.manifest: Manifest = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        point("checkpoint.write")
        others = sorted(path for path in self.folder.rglob("*") if _is_other(path, self.folder))
        digests = {
            str(path.relative_to(self.folder)): hash_file(path)
            for path in others[self.world.rank :: self.world.size]
        }
        written: Future[list[WriteResult]] = Future()
        written.set_result(_Written(results, digests | self._hashing.digests))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for written in cast(list[_Written], results):
            self.manifest |= written.digests
        self.manifest |= self._hashing.digests  # .metadata


def _is_other(path: Path, folder: Path) -> bool:
    """Whether it is a file that DCP did not write; another rank may be writing its own meanwhile."""
    return path.is_file() and not (path.parent == folder and path.suffix == ".distcp")


class _Written(list[WriteResult]):
    """What a rank tells the coordinator it has written, with the digests of the files."""

    def __init__(self, results: list[WriteResult], digests: Manifest) -> None:
        super().__init__(results)
        self.digests = digests

    def __reduce__(self) -> tuple[Any, ...]:
        return _Written, (list(self), self.digests)


class _HashingFileSystem(FileSystem):
    """digests: of the files that were written through it, by name."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb"
        with super().create_stream(path, mode) as file:
            stream = HashingStream(cast(io.BufferedWriter, file))
            yield cast(io.IOBase, stream)
        self.digests[Path(path).name] = stream.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class SafeReader(FileSystemReader):
    """DCP's reader, of ordinary files and with metadata restricted to DCP's own types. It reads the metadata
    once, for all loads of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _OrdinaryFiles()
        self.transforms = _PlainTensors()
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UserError, OSError, and pickle.UnpicklingError as of :func:`load_metadata`."""
        if self._metadata is None:
            self._metadata = self._read()
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def _read(self) -> Metadata:
        file = Path(self.path) / ".metadata"
        metadata = load_metadata(read_bounded(file, MAX_METADATA_BYTES))
        if not isinstance(metadata, Metadata):
            raise UserError(f"{file} does not hold checkpoint metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{file} names a file outside of its folder: {info.relative_path}")
        return metadata


class _OrdinaryFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        require_ordinary(Path(path))
        with super().create_stream(path, mode) as file:
            yield file


class _PlainTensors(_StorageReaderTransforms):
    """Looks at each tensor's file before torch does: a zip archive whose pickle says of what kind it is."""

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: IO[bytes]
    ) -> IO[bytes]:
        """Raises UserError."""
        name = read_item.storage_index.fqn
        if transform_descriptors:
            raise UserError(f"{name} is packed ({', '.join(transform_descriptors)}): not as it was written")
        try:
            _check_tensor_file(raw_stream)
        # zipfile raises the last two for archives that are compressed in unknown ways, or encrypted
        except (zipfile.BadZipFile, pickle.UnpicklingError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{name} is no tensor's file: {error}") from None
        raw_stream.seek(0)
        return raw_stream


def _check_tensor_file(stream: IO[bytes]) -> None:
    """Raises pickle.UnpicklingError, and as of zipfile."""
    with zipfile.ZipFile(_Seekable(stream)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise zipfile.BadZipFile(f"{entry.filename[:100]!r} is compressed")
            if entry.filename.endswith(".pkl"):
                if entry.file_size > MAX_TENSOR_PICKLE_BYTES:
                    raise zipfile.BadZipFile(f"its pickle has {entry.file_size} bytes")
                check_bounds(archive.read(entry))


class _Seekable(io.RawIOBase):
    """DCP's view of a part of a file, which counts the wrong way from its end, as zipfile needs it."""

    def __init__(self, view: IO[bytes]) -> None:
        view.seek(0, os.SEEK_END)
        self._view, self._length, self._at = view, view.tell(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._at))
        self._view.seek(self._at)
        found = self._view.read(wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, of tensors only: what else a checkpoint may hold is a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.storage_index.fqn} is no tensor, as all entries of a checkpoint are")
