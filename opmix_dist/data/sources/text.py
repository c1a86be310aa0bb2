"""Files of text and JSON lines: one process cuts them at line borders, others decode."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import IO

from opmix_dist.data.source import Document
from opmix_dist.data.sources.listing import CHUNK_BYTES, File, reading
from opmix_dist.data.sources.rows import Fields, parse_line
from opmix_dist.errors import UserError

MAX_LINE_BYTES = 1 << 28
"""Of a document: a line of JSON, or a file of text."""
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class TextChunk:
    """Whole files of text."""

    files: Sequence[tuple[int, str, bytes]]  # number, name, content

    def documents(self) -> Iterator[tuple[int, Document]]:
        for number, name, content in self.files:
            try:
                yield number, content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name} is not UTF-8 text (byte {error.start}): convert it, or leave it out with a glob"
                ) from None


def read_texts(first: int, files: Sequence[File]) -> TextChunk:
    """``files``, of which the first has number ``first``, in one chunk."""
    for file in files:
        if file.size > MAX_LINE_BYTES:
            raise UserError(f"{file.name} is larger than {MAX_LINE_BYTES} bytes: is it one document of text?")
    contents: list[bytes | Exception] = []
    for fs, of_fs in groupby(files, key=lambda file: file.fs):  # stores send the files at the same time
        contents += fs.cat_ranges([file.path for file in of_fs], None, None, on_error="return")
    read = []
    for number, (file, content) in enumerate(zip(files, contents, strict=True), first):
        with reading(file.name):
            if isinstance(content, Exception):
                raise content
            read.append((number, file.name, content))
    return TextChunk(read)


@dataclass(frozen=True)
class LinesChunk:
    """Whole lines of JSON."""

    number: int
    name: str
    first_line: int  # counted from 1
    data: bytes
    fields: Fields

    def documents(self) -> Iterator[tuple[int, Document]]:
        for line_number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line.strip():
                where = f"{self.name}:{line_number}"
                yield self.number, self.fields.document(parse_line(line, where), where)


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object a line."""

    file: File
    fields: Fields

    def chunks(self, number: int) -> Iterator[LinesChunk]:
        first_line = 1
        with reading(self.file.name), self.file.open() as raw:
            for block in cut_lines(_decompressed(raw, self.file.name), self.file.name):
                yield LinesChunk(number, self.file.name, first_line, block, self.fields)
                first_line += block.count(b"\n")


def cut_lines(stream: io.BufferedIOBase, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Blocks of whole lines, of ``size`` bytes and the rest of a line; the last line may lack its end."""
    while block := stream.read(size):
        if not block.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES:
                raise UserError(f"{name} has a line of more than {MAX_LINE_BYTES} bytes: is it JSON lines?")
            block += rest
        yield block


def _decompressed(raw: IO[bytes], name: str) -> io.BufferedIOBase:
    import pyarrow

    # pyarrow reads on over concatenated zstd frames and refuses a cut-off one; zstandard does neither
    compression = next((how for end, how in _COMPRESSIONS.items() if name.endswith(end)), None)
    return io.BufferedReader(pyarrow.input_stream(raw, compression=compression))
