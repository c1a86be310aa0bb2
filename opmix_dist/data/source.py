"""What a source of documents is: chunks that one process cuts and others read.

Cutting is cheap (bytes are moved, nothing is parsed), so that one process can feed as many tokenising ones as
a machine has cores. A chunk's place depends on the files only, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np


@dataclass(frozen=True)
class Conversation:
    """A chat: what a tokenizer's chat template is rendered with."""

    messages: Sequence[Mapping[str, Any]]  # `role` and `content`, and what else the template reads
    tools: Sequence[Mapping[str, Any]] | None = None
    group: str | None = None
    """Conversations of one group are held out together, or none of them is; None: it stands alone."""
    task: Mapping[str, Any] | None = None
    """How a reply is scored, as a line of ``tasks.jsonl``, where the domain is to have tasks."""


Document: TypeAlias = str | np.ndarray | Conversation
"""Text; or the token ids [n] of a source that is tokenised already; or a chat."""


class Place(NamedTuple):
    """Where a chunk begins: number of the source's file, number of the chunk in that file."""

    file: int
    chunk: int


START = Place(0, 0)


class SourceFile(NamedTuple):
    """A file as the user would name it, and its size."""

    name: str  # path or URL
    bytes: int


class Chunk(Protocol):
    """A few megabytes of a source; picklable."""

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Number of its file, and each document, in order. Called in a worker process.

        Raises:
            UserError: naming the file, and the line, row or document, that cannot be read.
        """


class Source(Protocol):
    """A domain's documents; the same ones in the same order every time they are read."""

    @property
    def names(self) -> Sequence[str]:
        """What the user asked for: paths, URLs and globs."""

    def files(self) -> Sequence[SourceFile]:
        """All files, in order. Raises UserError for a path or glob that matches none."""

    def chunks(self, start: Place = START) -> Iterator[tuple[Place, Chunk]]:
        """The chunks from ``start`` on, which is the place of a chunk; files before it are not opened.

        Raises:
            UserError: naming the file that cannot be read.
        """
