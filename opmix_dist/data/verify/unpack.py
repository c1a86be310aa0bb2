"""A compressed shard of a folder, decompressed somewhere else so that the folder stays as it is."""

from __future__ import annotations

from pathlib import Path

from opmix_dist.bounded import open_ordinary
from opmix_dist.data.store import BLOCK_BYTES, StoredFile, file_hash, one_line, size_of


class UnpackError(Exception):
    """The compressed file is not what its index says; the text is what is wrong with it."""


def unpack(stored: Path, file: StoredFile, raw: Path) -> None:
    """Check the compressed file and write ``raw``, whose own size and hash are left to who reads it.

    Raises:
        UnpackError: see there.
        OSError: it cannot be read, or ``raw`` not be written.
    """
    size = size_of(stored)
    if size != file.zip_bytes:
        raise UnpackError("is missing" if size < 0 else f"{size} of {file.zip_bytes} bytes are there")
    if file.zip_hash is None:
        raise UnpackError("has no hash in its index")
    if file_hash(stored) != file.zip_hash:
        raise UnpackError("its hash is not the one of its index: flipped bytes")
    _decompress(stored, raw, file.raw_bytes)


def _decompress(stored: Path, raw: Path, most: int) -> None:
    """A file that expands to far more than its index says must not fill the disk."""
    import zstandard

    written = 0
    with open(open_ordinary(stored), "rb") as source, open(raw, "wb") as out:
        reader = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
        try:
            while block := reader.read(BLOCK_BYTES):
                written += len(block)
                if written > most:
                    raise UnpackError(f"holds more than the {most} bytes of its index")
                out.write(block)
        except zstandard.ZstdError as error:
            raise UnpackError(f"cannot be decompressed ({one_line(error)})") from None
