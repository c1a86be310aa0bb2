"""How DCP's files are written and read here: hashed as they are written, and read without a trusted pickle.

DCP's ``.metadata`` and its non-tensor entries are pickles: they are read through an unpickler that admits
DCP's own metadata types only, and through ``weights_only`` loading.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from opmix_dist.bounded import read_bounded, require_ordinary
from opmix_dist.distributed import World
from opmix_dist.errors import UserError
from opmix_dist.exchange.manifest import FileDigest, HashingStream, Manifest, hash_file
from opmix_dist.faults.points import point

MAX_METADATA_BYTES = 1 << 30
"""Of DCP's index, some 250 bytes for each part of a tensor: thousands of tensors on hundreds of ranks."""


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


_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    (_DCP_METADATA, "Metadata"),
    (_DCP_METADATA, "MetadataIndex"),
    (_DCP_METADATA, "TensorStorageMetadata"),
    (_DCP_METADATA, "TensorProperties"),
    (_DCP_METADATA, "ChunkStorageMetadata"),
    (_DCP_METADATA, "BytesStorageMetadata"),
    (_DCP_METADATA, "StorageMeta"),
    (_DCP_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ADMITTED and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader, of ordinary files and with metadata restricted to DCP's own types."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _OrdinaryFiles()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        metadata = _MetadataUnpickler(io.BytesIO(read_bounded(file, MAX_METADATA_BYTES))).load()
        if not isinstance(metadata, Metadata):
            raise UserError(f"{file} does not hold checkpoint metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(f"{file} names a file outside of its folder: {info.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _OrdinaryFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        require_ordinary(Path(path))
        with super().create_stream(path, mode) as file:
            yield file


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, with non-tensor entries loaded as plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)  # raises on anything but plain data
        checked = io.BytesIO()
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
