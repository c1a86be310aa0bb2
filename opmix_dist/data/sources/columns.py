"""Rows of Parquet and Arrow files: one process moves record batches, others make documents of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from opmix_dist.data.source import Document
from opmix_dist.data.sources.listing import CHUNK_BYTES, File, one_line, reading
from opmix_dist.data.sources.rows import Fields
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch, ipc, parquet

MAX_CHUNK_ROWS = 1 << 14
_READ_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class RowsChunk:
    """A record batch, as an Arrow IPC stream: pickling a slice would send the whole that it is part of."""

    number: int
    name: str
    first_row: int  # counted from 1
    data: bytes
    fields: Fields

    def documents(self) -> Iterator[tuple[int, Document]]:
        from pyarrow import ipc

        with ipc.open_stream(self.data) as stream:
            batch = stream.read_next_batch()
        names = batch.schema.names
        for i in range(batch.num_rows):
            where = f"{self.name} row {self.first_row + i}"
            try:
                row = {name: batch.column(name)[i].as_py() for name in names}
            except UnicodeDecodeError:
                raise UserError(f"{where} is not UTF-8 text: mend or remove it") from None
            yield (
                self.number,
                self.fields.document(_without_nulls(row) if self.fields.messages else row, where),
            )


@dataclass(frozen=True)
class Parquet:
    """A Parquet file; row groups are streamed, so that a large one does not have to fit in memory."""

    file: File
    fields: Fields

    def chunks(self, number: int) -> Iterator[RowsChunk]:
        from pyarrow import parquet

        with _whole(self.file, "Parquet"), self.file.open() as raw:
            with parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES) as table:
                columns = self.fields.columns(table.schema_arrow.names, self.file.name)
                batches = _parquet_batches(table, columns)
                yield from _row_chunks(batches, number, self.file.name, self.fields)


@dataclass(frozen=True)
class Arrow:
    """An Arrow IPC file or stream."""

    file: File
    fields: Fields

    def chunks(self, number: int) -> Iterator[RowsChunk]:
        with _whole(self.file, "Arrow"), self.file.open() as raw:
            batches = _arrow_batches(raw, self.fields, self.file.name)
            yield from _row_chunks(batches, number, self.file.name, self.fields)


def _row_chunks(
    batches: Iterator[RecordBatch], number: int, name: str, fields: Fields
) -> Iterator[RowsChunk]:
    import pyarrow
    from pyarrow import ipc

    first_row = 1
    for batch in batches:
        sink = pyarrow.BufferOutputStream()
        with ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        yield RowsChunk(number, name, first_row, sink.getvalue().to_pybytes(), fields)
        first_row += batch.num_rows


def _parquet_batches(table: parquet.ParquetFile, columns: list[str]) -> Iterator[RecordBatch]:
    """Batches of about ``CHUNK_BYTES``; how many rows that is, each row group's metadata tells."""
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        chosen = [metadata.column(i) for i in range(metadata.num_columns)]
        size = sum(
            one.total_uncompressed_size for one in chosen if one.path_in_schema.split(".")[0] in columns
        )
        rows = _rows_per_chunk(metadata.num_rows, size)
        yield from table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _arrow_batches(raw: IO[bytes], fields: Fields, name: str) -> Iterator[RecordBatch]:
    reader = _open_arrow(raw)
    columns = fields.columns(reader.schema.names, name)
    for batch in _all_batches(reader):
        wanted = batch.select(columns)
        wanted.validate(full=True)  # its offsets come from the file, and nothing else checks them
        rows = _rows_per_chunk(wanted.num_rows, wanted.nbytes)
        yield from (wanted.slice(begin, rows) for begin in range(0, wanted.num_rows, rows))


def _without_nulls(value: Any) -> Any:
    """As the row was before a column gave its objects the keys of all other rows' objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _open_arrow(raw: IO[bytes]) -> ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader:
    """Raises what pyarrow raises when it is neither form, or UserError's cause when a stream has no end."""
    import pyarrow
    from pyarrow import ipc

    magic = raw.read(len(_ARROW_FILE_MAGIC))
    if magic == _ARROW_FILE_MAGIC:
        raw.seek(0)
        return ipc.open_file(raw)
    raw.seek(-len(_ARROW_STREAM_END), io.SEEK_END)
    if raw.read() != _ARROW_STREAM_END:  # a stream that is cut between two batches reads well otherwise
        raise pyarrow.ArrowInvalid("the mark at a stream's end is missing")
    raw.seek(0)
    return ipc.open_stream(raw)


def _all_batches(reader: ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader) -> Iterator[RecordBatch]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _rows_per_chunk(rows: int, size: int) -> int:
    """Of ``rows`` rows that have ``size`` bytes together."""
    return max(1, min(MAX_CHUNK_ROWS, rows * CHUNK_BYTES // max(size, 1)))


@contextmanager
def _whole(file: File, kind: str) -> Iterator[None]:
    """Say of a file that pyarrow cannot make sense of that it is cut off or of another kind."""
    import pyarrow

    with reading(file.name):
        try:
            yield
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.name} is not a whole {kind} file: {one_line(error)}") from error
