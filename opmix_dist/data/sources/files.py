"""A domain's files as one source, and what a user's arguments say of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from opmix_dist.data.catalogue import check_domain_name
from opmix_dist.data.source import START, Chunk, Place, SourceFile
from opmix_dist.data.sources.listing import CHUNK_BYTES, File, list_files
from opmix_dist.data.sources.readers import WHOLE, Entry, choose_readers
from opmix_dist.data.sources.rows import Fields
from opmix_dist.data.sources.text import read_texts
from opmix_dist.data.sources.tokens import TokenDType, TokenFormat
from opmix_dist.errors import UserError


@dataclass(frozen=True)
class FileSource:
    """Documents of the files that paths, folders, globs and URLs name, in the order of their sorted names.

    The table of formats is in the package's docstring. Token ids come without their EOS, which the ingest
    appends to every document.

    Args:
        names: what the user asked for.
        text_field: field of JSON lines, or column, that holds the text.
        messages_field: field or column of a chat's messages; makes every row a chat.
        eos_id: EOS of the tokenizer that made token ids; needed to read any.
        token_dtype: type of token ids in files that do not say it.
    """

    names: Sequence[str]
    text_field: str = "text"
    messages_field: str | None = None
    eos_id: int | None = None
    token_dtype: TokenDType | None = None

    def files(self) -> Sequence[SourceFile]:
        return [SourceFile(file.name, file.size) for file, _ in self._entries]

    def chunks(self, start: Place = START) -> Iterator[tuple[Place, Chunk]]:
        """As the protocol says. Here ``start`` may also be the place one chunk behind a file's last."""
        number, first = start
        while number < len(self._entries):
            reader = self._entries[number][1]
            if reader is WHOLE:
                texts = self._texts(number)
                if not first:
                    yield Place(number, 0), read_texts(number, texts)
                number += len(texts)
            else:
                for place, chunk in enumerate(reader.chunks(number)):
                    if place >= first:
                        yield Place(number, place), chunk
                number += 1
            first = 0

    def _texts(self, first: int) -> list[File]:
        """The files from ``first`` on that share its chunk: what they are follows from sizes alone."""
        texts: list[File] = []
        size = 0
        for number in range(first, len(self._entries)):
            file, reader = self._entries[number]
            size += file.size
            if reader is not WHOLE or (texts and size > CHUNK_BYTES):
                break
            texts.append(file)
        return texts

    @cached_property
    def _entries(self) -> list[Entry]:
        """Listed once, so that all chunks are of the same files."""
        fields = Fields(self.text_field, self.messages_field)
        form = TokenFormat(self.eos_id, self.token_dtype)
        entries = choose_readers(list_files(self.names), fields, form)
        return sorted(entries, key=lambda entry: entry[0].name.split("/"))


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


def files_fingerprint(files: Iterable[SourceFile]) -> str:
    """sha256 over the names and sizes in bytes of ``files``; their folder may move."""
    listing = [[file.name.rpartition("/")[2], file.bytes] for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
