"""Where a domain's documents come from: text files, JSON lines, Parquet.

The reader is chosen by the file's name: ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` hold one JSON object a
line, ``.parquet`` a column of strings, and any other file is one document of UTF-8 text. Files are read in
the order of their sorted paths and streamed, so a domain may be larger than memory.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opmix_dist.data.catalogue import check_domain_name
from opmix_dist.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_BATCH_ROWS = 1024


class Source(Protocol):
    """A domain's documents; the same ones in the same order every time they are read."""

    @property
    def names(self) -> Sequence[str]:
        """What the user asked for: paths and globs."""

    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when files come, go, or change their size; cheap."""

    def documents(self) -> Iterator[str]:
        """The documents in order; UserError names the file, and the line or row, that cannot be read."""


@dataclass(frozen=True)
class FileSource:
    """Documents of the files that paths, folders and globs name."""

    names: Sequence[str]
    text_field: str = "text"

    def files(self) -> list[Path]:
        """Sorted; hidden files are left out. Raises UserError for a path or glob that matches no file."""
        return sorted({file for name in self.names for file in _expand(name)})

    def fingerprint(self) -> str:
        return files_fingerprint(self.files())

    def documents(self) -> Iterator[str]:
        for file in self.files():
            yield from self._read(file)

    def _read(self, file: Path) -> Iterator[str]:
        try:
            if file.name.endswith(JSONL_SUFFIXES):
                yield from _read_jsonl(file, self.text_field)
            elif file.name.endswith(".parquet"):
                yield from _read_parquet(file, self.text_field)
            else:
                yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, or leave it out with a glob"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def parse_domains(arguments: Iterable[str]) -> dict[str, list[str]]:
    """``["web=a/*.jsonl", "web=b", "code=src"]`` to ``{"web": ["a/*.jsonl", "b"], "code": ["src"]}``.

    Raises:
        UserError: an argument without ``=``, without a path, or with an impossible name.
    """
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise UserError(f"--domain {argument}: write NAME=PATH_OR_GLOB")
        domains.setdefault(check_domain_name(name), []).append(path)
    return domains


def files_fingerprint(files: Iterable[Path]) -> str:
    """sha256 over the names and sizes in bytes of ``files``; their folder may move."""
    listing = [[file.name, file.stat().st_size] for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    pattern = str(path / "**" / "*") if path.is_dir() else str(path)
    files = [file for file in map(Path, glob.iglob(pattern, recursive=True)) if file.is_file()]
    if not files:
        raise UserError(f"{name} matches no file: give a file, a folder, or a glob in quotes")
    return files


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    import pyarrow

    # pyarrow reads on over concatenated zstd frames and refuses a cut-off one; zstandard does neither
    with pyarrow.input_stream(str(file)) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if line.strip():
                yield _json_document(line, field, f"{file}:{number}")


def _json_document(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend or remove that line") from None
    if not isinstance(row, dict) or field not in row:
        raise UserError(f"{where} has no field {field!r}: name the text's with --text-field")
    return _checked_text(row[field], field, where)


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file} has no column {field!r}, but {columns}: name one with --text-field")
            batches = table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, 1):
                yield _checked_text(text, field, f"{file} row {row}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a whole Parquet file: {' '.join(str(error).split())}") from None


def _checked_text(text: Any, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {type(text).__name__}, not text: mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {field!r} has half a surrogate pair: mend or remove it") from None
    return text
