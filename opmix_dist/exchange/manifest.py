"""What the files of a folder must be: their sizes and checksums, recorded when they were written.

The checksum finds what disks and networks do to files. It is no signature: who can change the files can
change the manifest too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

import xxhash
from pydantic import AfterValidator, Field, StringConstraints

from opmix_dist.bounded import open_ordinary
from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import Record

_CHUNK_BYTES = 4 << 20


def _within(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or not path.parts:
        raise ValueError(f"{name!r} is no path within the folder")
    return name


RelativePath = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_within)]


class FileDigest(Record):
    size: int = Field(ge=0)
    """Bytes."""
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


Manifest = dict[RelativePath, FileDigest]
"""By path within the folder."""


class CheckpointMarker(Record):
    """COMPLETE.json of a checkpoint."""

    step: int = Field(ge=0)
    files: Manifest | None = None
    """None in checkpoints from before there were manifests."""


class HashingStream:
    """A file opened for writing whose content is hashed as it passes. It cannot seek: what was hashed is what
    lies in the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._state = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        written = self._file.write(data)
        assert written == len(data)  # of a buffered file
        self._state.update(data)
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    @property
    def digest(self) -> FileDigest:
        """Of all that was written so far."""
        return FileDigest(size=self._size, xxh3_128=self._state.hexdigest())


def hash_file(path: Path) -> FileDigest:
    """Raises OSError and UserError as ``open_ordinary``."""
    state, size = xxhash.xxh3_128(), 0
    with open(open_ordinary(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            size += len(chunk)
    return FileDigest(size=size, xxh3_128=state.hexdigest())


def damage(folder: Path, manifest: Mapping[str, FileDigest], *, checksums: bool) -> str | None:
    """How the first damaged file differs from what was written; None: all are whole.

    Args:
        checksums: compare contents too, and not only sizes.
    """
    for name, expected in manifest.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                return f"{name} has {size} bytes and not the {expected.size} that were written"
            if checksums and hash_file(path) != expected:
                return f"{name} holds other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, UserError) as error:
            return f"{name} cannot be read: {error}"
    return None
