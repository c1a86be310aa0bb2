"""Folders of MDS shards that others wrote: a column of text, of chats as JSON, or of token ids.

The index says which shards there are and in what order. Only columns of plain data are read: an index that
declares a pickle, or a file outside of its folder, is refused. Token ids are one stream over all shards of an
index, as their writers fill samples regardless of documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from opmix_dist.data.mds import import_streaming
from opmix_dist.data.source import Document
from opmix_dist.data.sources.listing import CHUNK_BYTES, File, one_line, reading
from opmix_dist.data.sources.rows import Fields, parse_line
from opmix_dist.data.sources.tokens import TokenFormat, TokensChunk, cut_at_eos
from opmix_dist.errors import UserError

INDEX = "index.json"
MAX_INDEX_BYTES = 256 << 20
TOKENS_COLUMN = "tokens"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=-]*"
_SAFE = (
    r"^(str|bytes|int|json|u?int(8|16|32|64)|float(16|32|64)|str_(int|float|decimal)|ndarray(:[a-z0-9:,]*)?)$"
)


class _Part(BaseModel):
    basename: str = Field(pattern=f"^{_PART}(/{_PART})*$", description="stays in the index's folder")
    bytes: int = Field(ge=1, lt=1 << 32)


class Shard(BaseModel):
    """What the index says of a shard."""

    version: Literal[2]
    format: Literal["mds"]
    column_names: list[str]
    column_encodings: list[Annotated[str, Field(pattern=_SAFE)]]
    column_sizes: list[Annotated[int, Field(ge=0, lt=1 << 32)] | None]
    samples: int = Field(ge=0, lt=1 << 32)
    compression: str | None
    raw_data: _Part
    zip_data: _Part | None

    @model_validator(mode="after")
    def _one_of_each(self) -> Shard:
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("the columns' names, encodings and sizes are not equally many")
        return self

    def column(self, name: str, encodings: tuple[str, ...]) -> int | None:
        """Number of the column ``name``, if it is there in one of ``encodings``."""
        for number, (found, encoding) in enumerate(
            zip(self.column_names, self.column_encodings, strict=True)
        ):
            if found == name and encoding.partition(":")[0] in encodings:
                return number
        return None

    def cut(self, sample: bytes, column: int) -> bytes:
        """One column's bytes of a sample; ValueError when the sample is too short."""
        at, sizes = 0, []
        for fixed in self.column_sizes:
            sizes.append(fixed or int.from_bytes(sample[at : at + 4], "little"))
            at += 0 if fixed else 4
        begin = at + sum(sizes[:column])
        if begin + sizes[column] > len(sample):
            raise ValueError("a sample is too short for its columns")
        return sample[begin : begin + sizes[column]]


class _Index(BaseModel):
    version: Literal[2]
    shards: list[Shard]


def read_index(file: File) -> list[Shard] | None:
    """The shards of an ``index.json``, or None when it is some other JSON.

    Raises:
        UserError: an unsafe column, or a shard of another format or outside of the folder.
    """
    if file.size > MAX_INDEX_BYTES:
        raise UserError(f"{file.name} is larger than {MAX_INDEX_BYTES} bytes, which no index of shards is")
    with reading(file.name), file.open() as stream:
        data = stream.read()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not {"version", "shards"} <= content.keys():
        return None
    try:
        return _Index.model_validate(content).shards
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{file.name}: `{key}` is {str(first['input'])[:80]!r}, which is not read from others' shards "
            f"({first['msg']}): convert them to JSON lines"
        ) from None


@dataclass(frozen=True)
class ShardRowsChunk:
    """Values of the columns that make a document, in the encoding ``str`` or ``json``."""

    number: int
    name: str
    first_sample: int
    rows: Sequence[dict[str, bytes]]
    json_columns: frozenset[str]
    fields: Fields

    def documents(self) -> Iterator[tuple[int, Document]]:
        for i, row in enumerate(self.rows, self.first_sample):
            where = f"{self.name} sample {i}"
            values = {name: self._value(name, data, where) for name, data in row.items()}
            yield self.number, self.fields.document(values, where)

    def _value(self, column: str, data: bytes, where: str) -> Any:
        if column in self.json_columns:
            return parse_line(data, where)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}: {column!r} is not UTF-8 text: write the shards without it") from None


@dataclass(frozen=True)
class MdsShard:
    """One of the ``shards`` of an index, in order."""

    shards: Sequence[tuple[File, Shard]]
    position: int
    fields: Fields
    form: TokenFormat

    def chunks(self, number: int) -> Iterator[ShardRowsChunk | TokensChunk]:
        file, shard = self.shards[self.position]
        wanted = self.fields.messages or self.fields.text
        if shard.column(wanted, ("str", "json")) is not None:
            yield from self._rows(number)
        elif self.fields.messages is None and shard.column(TOKENS_COLUMN, ("ndarray", "bytes")) is not None:
            eos_id = self.form.eos(file.name)
            for tokens in cut_at_eos(self._stream(eos_id), eos_id, file.name):
                yield TokensChunk(number, file.name, tokens, eos_id)
        else:
            columns = ", ".join(map(":".join, zip(shard.column_names, shard.column_encodings, strict=True)))
            raise UserError(
                f"{file.name} has neither a column {wanted!r} of text nor {TOKENS_COLUMN!r} of ids, but "
                f"{columns}: name one with --{'messages' if self.fields.messages else 'text'}-field"
            )

    def _rows(self, number: int) -> Iterator[ShardRowsChunk]:
        file, shard = self.shards[self.position]
        columns = self.fields.columns(shard.column_names, file.name)
        cuts = {name: shard.column(name, ("str", "json")) for name in columns}
        at = {name: column for name, column in cuts.items() if column is not None}
        as_json = frozenset(name for name in at if shard.column(name, ("json",)) is not None)
        first = 1
        for rows in _batches(_samples(file, shard, list(at.values()))):
            named = [dict(zip(at, row, strict=True)) for row in rows]
            yield ShardRowsChunk(number, file.name, first, named, as_json, self.fields)
            first += len(rows)

    def _stream(self, eos_id: int) -> Iterator[np.ndarray]:
        """Token ids from the first document that begins in this shard to the last one's end.

        A document that the shard before began is that one's, so the last document is read to its end in the
        next shard. Thus a shard can be read without those before it.
        """
        pieces = _token_pieces(*self.shards[self.position], self.form)
        yield from pieces if self.position == 0 else _behind_eos(pieces, eos_id)
        if self.position + 1 < len(self.shards):
            yield from _up_to_eos(_token_pieces(*self.shards[self.position + 1], self.form), eos_id)


def _behind_eos(pieces: Iterator[np.ndarray], eos_id: int) -> Iterator[np.ndarray]:
    """What follows the first EOS."""
    for piece in pieces:
        found = np.flatnonzero(piece == eos_id)
        if found.size:
            yield piece[found[0] + 1 :]
            yield from pieces


def _up_to_eos(pieces: Iterator[np.ndarray], eos_id: int) -> Iterator[np.ndarray]:
    """What comes up to the first EOS, and that EOS."""
    for piece in pieces:
        found = np.flatnonzero(piece == eos_id)
        yield piece[: found[0] + 1] if found.size else piece
        if found.size:
            return


def _token_pieces(file: File, shard: Shard, form: TokenFormat) -> Iterator[np.ndarray]:
    """Token ids of a shard in arrays of about ``CHUNK_BYTES``."""
    import_streaming()
    from streaming.base.format.mds.encodings import mds_decode

    column = shard.column(TOKENS_COLUMN, ("ndarray", "bytes"))
    if column is None:
        raise UserError(f"{file.name} has no column {TOKENS_COLUMN!r} as the shard before it: copy it again")
    encoding = shard.column_encodings[column]
    dtype = form.array_dtype(file.name) if encoding == "bytes" else None
    for samples in _batches(_samples(file, shard, [column])):
        with _fits(file):
            parts = [mds_decode(encoding, one).ravel() if dtype is None else np.frombuffer(one, dtype)
                     for (one,) in samples]  # fmt: skip
        kinds = {part.dtype.name for part in parts if part.dtype.kind not in "iu"}
        if kinds:
            raise UserError(f"{file.name}: column {TOKENS_COLUMN!r} is {', '.join(kinds)}, not token ids")
        yield np.concatenate(parts)


def _batches(samples: Iterable[list[bytes]]) -> Iterator[list[list[bytes]]]:
    """Lists of about ``CHUNK_BYTES``."""
    batch: list[list[bytes]] = []
    size = 0
    for values in samples:
        batch.append(values)
        size += sum(map(len, values))
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _samples(file: File, shard: Shard, columns: Sequence[int]) -> Iterator[list[bytes]]:
    """The values of ``columns`` of each sample; the shard is held in memory (64 MB by the writer's default).

    Raises:
        UserError: the file is not what the index says.
    """
    with _fits(file):
        data = _raw_shard(file, shard)
        header = np.frombuffer(data, "<u4", count=1 + shard.samples + 1)
        bounds = header[1:].astype(np.int64)
        if header[0] != shard.samples or bounds[-1] > len(data) or np.any(np.diff(bounds) < 0):
            raise ValueError("its table of samples is damaged")
        for begin, end in pairwise(bounds.tolist()):
            sample = data[begin:end]
            yield [shard.cut(sample, column) for column in columns]


@contextmanager
def _fits(file: File) -> Iterator[None]:
    """Turn what damaged bytes make numpy and the decoders raise into a UserError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, AssertionError) as error:
        raise UserError(
            f"shard {file.name} does not fit its {INDEX}: {one_line(error)}; copy it again"
        ) from error


def _raw_shard(file: File, shard: Shard) -> bytes:
    """All bytes of a shard, decompressed; ValueError when they are not as many as the index says."""
    packed = shard.zip_data is not None and file.base == shard.zip_data.basename.rpartition("/")[2]
    stored = shard.zip_data if packed and shard.zip_data else shard.raw_data
    if file.size > stored.bytes:  # before they are read
        raise ValueError(f"{file.size} bytes are there, and {stored.bytes} were written")
    with reading(file.name), file.open() as stream:
        data = stream.read()
    if packed:
        data = _decompress(data, shard)
    if len(data) != shard.raw_data.bytes:
        raise ValueError(f"{len(data)} of {shard.raw_data.bytes} bytes are there")
    return data


def _decompress(data: bytes, shard: Shard) -> bytes:
    import_streaming()
    from streaming.base.compression import decompress

    try:
        return decompress(shard.compression, data)
    except Exception as error:  # each algorithm's library has its own
        raise ValueError(f"it cannot be decompressed ({one_line(error)})") from error
