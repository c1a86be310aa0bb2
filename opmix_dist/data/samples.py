"""What a sample is on disk: tokens, where documents end in it, and which tokens are learnt.

A shard is an MDS file with these columns, in this one place for those who write and those who read:

- ``tokens``: ids [n], uint16 or uint32, 1 <= n <= T;
- ``ends``: uint32 [k], ascending; documents end before these positions of the sample. A document that goes on
  in the next sample has no end here, so that joined samples give the documents back exactly;
- ``spans``, in chat domains only: uint32 [m, 2], the half-open ranges of tokens that count in the loss.

Example, T = 8, documents of 5 and 7 tokens: the samples have ends [5] and [4].
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opmix_dist.data.mds import import_streaming

DType = Literal["uint16", "uint32"]
Compression = Literal["zstd", "none"]
HASH = "xxh3_128"
INDEX_FILE = "index.json"
SHARD_BYTES = 64 << 20
"""Uncompressed size at which a shard is closed."""
_TOKENS, _ENDS, _SPANS = "tokens", "ends", "spans"
_SAFE_COLUMNS = {
    _TOKENS: re.compile(r"ndarray:uint(?:16|32)"),
    _ENDS: re.compile("bytes"),
    _SPANS: re.compile("bytes"),
}


@dataclass(frozen=True)
class Sample:
    """One row of a domain."""

    tokens: np.ndarray  # uint16 or uint32 [n]
    ends: np.ndarray  # uint32 [k], in 1..n, ascending
    spans: np.ndarray | None = None  # uint32 [m, 2], within 0..n; None: every token counts

    @property
    def stored_bytes(self) -> int:
        """Roughly what the sample takes in a shard, uncompressed."""
        return self.tokens.nbytes + self.ends.nbytes + (0 if self.spans is None else self.spans.nbytes) + 20

    def to_row(self) -> dict[str, Any]:
        row = {_TOKENS: self.tokens, _ENDS: self.ends.astype("<u4").tobytes()}
        return row if self.spans is None else {**row, _SPANS: self.spans.astype("<u4").tobytes()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """Raises ValueError when the row is none."""
        tokens, ends = row[_TOKENS], np.frombuffer(row[_ENDS], dtype="<u4")
        spans = np.frombuffer(row[_SPANS], dtype="<u4").reshape(-1, 2) if _SPANS in row else None
        marks = ends if spans is None else np.append(ends, spans.ravel())
        if tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"its tokens have the shape {list(tokens.shape)}, not one of at least 1")
        if len(marks) and marks.max() > len(tokens):
            raise ValueError("its document ends lie outside of it")
        return cls(tokens, ends, spans)


def columns(dtype: DType, *, spans: bool) -> dict[str, str]:
    """MDS encodings by column name."""
    base = {_TOKENS: f"ndarray:{dtype}", _ENDS: "bytes"}
    return {**base, _SPANS: "bytes"} if spans else base


def columns_fault(names: Sequence[str], encodings: Sequence[str]) -> str | None:
    """Why columns that an index declares are not a sample's, or None; a ``pkl`` column is never one."""
    declared = dict(zip(names, encodings, strict=True))
    for name, encoding in declared.items():
        if name not in _SAFE_COLUMNS or not _SAFE_COLUMNS[name].fullmatch(encoding):
            return f"column `{name}` of type {encoding} is none of a sample's"
    missing = [name for name in (_TOKENS, _ENDS) if name not in declared]
    return f"column `{missing[0]}` is missing" if missing else None


def write_shard(
    folder: Path,
    number: int,
    samples: Iterable[Sample],
    *,
    dtype: DType,
    spans: bool,
    compression: Compression,
) -> dict[str, Any]:
    """Write shard ``number`` of a split and return its entry for the index.

    The file appears under its name when it is complete and on the disk; the same samples give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    import_streaming()
    from streaming import MDSWriter

    scratch = folder / f".shard.{number:05}"
    shutil.rmtree(scratch, ignore_errors=True)
    writer = MDSWriter(
        out=str(scratch),
        columns=columns(dtype, spans=spans),
        compression=None if compression == "none" else compression,
        hashes=[HASH],
        size_limit=None,
    )
    for sample in samples:
        writer.write(sample.to_row())
    writer.flush_shard()  # finish() would write an index too, and may sleep for a second
    writer.executor.shutdown()
    entry: dict[str, Any] = writer.shards[0]
    for key in ("raw_data", "zip_data"):
        if entry[key]:
            entry[key]["basename"] = entry[key]["basename"].replace("shard.00000.", f"shard.{number:05}.", 1)
    written = next(scratch.glob("shard.*"))
    _fsync(written)
    os.replace(written, folder / (entry["zip_data"] or entry["raw_data"])["basename"])
    shutil.rmtree(scratch)
    return entry


def write_index(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write ``index.json`` over the shards of ``folder``, in order, as MDSWriter does."""
    text = json.dumps({"version": 2, "shards": list(entries)}, sort_keys=True)
    (folder / INDEX_FILE).write_text(text)
    _fsync(folder / INDEX_FILE)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
