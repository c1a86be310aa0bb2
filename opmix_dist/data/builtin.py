"""Seven domains of real text that every installation of this project holds, for demos and tests.

==========  ===================================================================================
python      source of Python's standard library
cpp         C++ headers of torch
stubs       type stubs of numpy and torch
prose       long descriptions and Markdown files of the installed packages
reference   Python's language topics (``pydoc_data``) and docstrings of scipy and numpy
licences    licence files and notices of the installed packages
json        JSON files of plotly and torch, and bills of materials of the installed packages
==========  ===================================================================================

The text follows the installed versions, so token counts differ a little between installations.
"""

from __future__ import annotations

import ast
import email
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from opmix_dist.data.source import START, Chunk, Document, Place, SourceFile
from opmix_dist.errors import UserError

DEFAULT_MAX_BYTES = 3_000_000
MIN_BYTES = 200_000
MAX_DOCUMENT_CHARS = 4_000
CHUNK_CHARS = 500_000  # small: a domain has few megabytes, and every process should get some
MIN_STRING_CHARS = 400  # shorter docstrings are mostly one line that repeats the function's name

# Tests, and generated tables that say the same thing thousands of times
_LEFT_OUT = {"test", "tests", "idlelib", "encodings", "pydoc_data", "site-packages", "ops", "__pycache__"}
_LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)


@dataclass(frozen=True)
class _Recipe:
    find: Callable[[], Iterable[Path]]
    read: Callable[[Path], Iterable[str]]


@dataclass(frozen=True)
class BuiltinSource:
    """One built-in domain: whole files in a seeded order until ``max_bytes`` of UTF-8 are reached.

    Files are cut at line borders into documents of at most ``MAX_DOCUMENT_CHARS`` characters, so that a
    small eval split holds many documents; a longer line stays whole.
    """

    domain: str
    max_bytes: int
    seed: int

    @property
    def names(self) -> Sequence[str]:
        return [f"builtin:{self.domain}"]

    def files(self) -> Sequence[SourceFile]:
        """All files that the domain may take; how many are read, ``max_bytes`` decides."""
        return [SourceFile(str(file), file.stat().st_size) for file in self._files]

    def chunks(self, start: Place = START) -> Iterator[tuple[Place, Chunk]]:
        """Whole files, about ``CHUNK_CHARS`` characters in each chunk, which is the first of its file."""
        texts: list[tuple[int, str]] = []
        size = 0
        for _, of_file in groupby(self._texts, key=itemgetter(0)):
            if size >= CHUNK_CHARS:
                yield from _chunk(texts, start)
                texts, size = [], 0
            whole = list(of_file)
            texts += whole
            size += sum(len(text) for _, text in whole)
        yield from _chunk(texts, start)

    @cached_property
    def _files(self) -> list[Path]:
        def order(file: Path) -> bytes:
            return hashlib.sha256(f"{self.seed}/{'/'.join(file.parts[-3:])}".encode()).digest()

        return sorted(sorted(set(_RECIPES[self.domain].find())), key=order)

    @cached_property
    def _texts(self) -> list[tuple[int, str]]:
        """Each document with the number of its file."""
        texts, size = [], 0
        for number, text in self._pieces():
            texts.append((number, text))
            size += len(text.encode())
            if size >= self.max_bytes:
                return texts
        if size < MIN_BYTES:
            raise UserError(
                f"built-in domain {self.domain} finds only {size} bytes in this installation, fewer than "
                f"{MIN_BYTES}: reinstall the project's requirements, or prepare your own text with --domain"
            )
        return texts

    def _pieces(self) -> Iterator[tuple[int, str]]:
        read = _RECIPES[self.domain].read
        for number, file in enumerate(self._files):
            for whole in read(file):
                for piece in split_lines(whole):
                    yield number, piece


@dataclass(frozen=True)
class BuiltinChunk:
    """Documents, each with the number of its file."""

    texts: Sequence[tuple[int, str]]

    def documents(self) -> Iterator[tuple[int, Document]]:
        return iter(self.texts)


def _chunk(texts: Sequence[tuple[int, str]], start: Place) -> Iterator[tuple[Place, Chunk]]:
    """The chunk of ``texts``, unless there are none or it lies before ``start``."""
    if texts and Place(texts[0][0], 0) >= start:
        yield Place(texts[0][0], 0), BuiltinChunk(texts)


def builtin_domains(max_bytes: int = DEFAULT_MAX_BYTES, seed: int = 0) -> dict[str, BuiltinSource]:
    """The built-in domains by name, each of about ``max_bytes`` bytes of UTF-8 at most.

    Reading one raises UserError when this installation holds too little of it.
    """
    return {name: BuiltinSource(name, max_bytes, seed) for name in _RECIPES}


def split_lines(text: str, max_chars: int = MAX_DOCUMENT_CHARS) -> Iterator[str]:
    """Cut at line borders into pieces of at most ``max_chars`` characters; a longer line stays whole."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if piece and length + len(line) > max_chars:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield "".join(piece)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _site() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _tree(root: Path, pattern: str) -> Iterator[Path]:
    for file in root.rglob(pattern):
        if file.is_file() and _LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            yield file


def _prose_files() -> Iterator[Path]:
    yield from _site().glob("*.dist-info/METADATA")
    yield from _tree(_site(), "*.md")


def _reference_files() -> Iterator[Path]:
    yield _stdlib() / "pydoc_data" / "topics.py"
    for package in ("scipy", "numpy"):
        yield from _tree(_site() / package, "*.py")


def _licence_files() -> Iterator[Path]:
    for file in _site().glob("*.dist-info/**/*"):
        if file.is_file() and _LICENCE.match(file.name):
            yield file


def _json_files() -> Iterator[Path]:
    for package in ("plotly", "torch"):
        yield from _tree(_site() / package, "*.json")
    yield from _site().glob("*.dist-info/sboms/*.json")


def _stub_files() -> Iterator[Path]:
    for package in ("numpy", "torch"):
        yield from _tree(_site() / package, "*.pyi")


def _whole(file: Path) -> Iterator[str]:
    """The file's text. Some packages ship Latin-1 licences: those are no UTF-8 text and are left out."""
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return


def _description(file: Path) -> Iterator[str]:
    for text in _whole(file):
        yield str(email.message_from_string(text).get_payload()) if file.name == "METADATA" else text


def _long_strings(file: Path) -> Iterator[str]:
    """Docstrings, and other string constants as long: topics and `add_newdoc` calls hold theirs so."""
    for text in _whole(file):
        for node in ast.walk(ast.parse(text)):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and len(value) >= MIN_STRING_CHARS:
                yield inspect.cleandoc(value)


_RECIPES = {
    "python": _Recipe(lambda: _tree(_stdlib(), "*.py"), _whole),
    "cpp": _Recipe(lambda: _tree(_site() / "torch" / "include", "*.h"), _whole),
    "stubs": _Recipe(_stub_files, _whole),
    "prose": _Recipe(_prose_files, _description),
    "reference": _Recipe(_reference_files, _long_strings),
    "licences": _Recipe(_licence_files, _whole),
    "json": _Recipe(_json_files, _whole),
}
