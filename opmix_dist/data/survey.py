"""The first pass over a domain: a digest of each document, and with it whether it is kept and held out.

Workers digest chunks, and one process appends what they find to files with one row for each document. These
files are all that later stages need, and whatever their length, only blocks of them are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opmix_dist.atomic import write_json
from opmix_dist.bounded import read_json, require_ordinary
from opmix_dist.data.decontaminate import Grams
from opmix_dist.data.source import Chunk, Conversation, Document, Place
from opmix_dist.data.tokenizer import TokenizerFiles, check_ids
from opmix_dist.errors import UserError

DIGEST_BYTES = 16
BLOCK_DOCUMENTS = 1 << 20
"""Rows of a survey's files that are read at a time."""


MAX_STATE_BYTES = 1 << 16


class Mark(IntEnum):
    """What becomes of a document."""

    TRAIN = 0
    EVAL = 1
    DUPLICATE = 2
    EMPTY = 3
    CONTAMINATED = 4


# --- in the workers ----------------------------------------------------------------------------------------


class Surveyed(NamedTuple):
    """What a worker found in one chunk of n documents."""

    digests: np.ndarray  # uint8 [n, 16]
    ranks: np.ndarray  # float64 [n], in [0, 1)
    marks: np.ndarray  # uint8 [n]; TRAIN stands for all that is not dropped yet
    files: np.ndarray  # uint32 [n]


@dataclass(frozen=True)
class Surveyor:
    """What a worker is told of a domain; picklable.

    A document's rank is a number in [0, 1) that its content, or its group, and the seed decide, so that the
    split depends neither on the order nor on the files.
    """

    seed: int
    tokenizer: TokenizerFiles | None
    """For documents of token ids; None before a tokenizer is trained."""

    def __call__(self, chunk: Chunk) -> Surveyed:
        """Raises UserError or FileFault for a document that cannot be used."""
        digests, ranks, marks, files = bytearray(), [], bytearray(), []
        for file, document in chunk.documents():
            digest = document_digest(document)
            digests += digest
            ranks.append(_rank(_group_digest(document) or digest, self.seed))
            marks.append(self._mark(file, document, digest))
            files.append(file)
        return Surveyed(
            np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES),
            np.array(ranks, np.float64),
            np.frombuffer(bytes(marks), np.uint8),
            np.array(files, np.uint32),
        )

    def _mark(self, file: int, document: Document, digest: bytes) -> Mark:
        if isinstance(document, np.ndarray) and self.tokenizer is not None:
            check_ids(document, file, self.tokenizer.vocab_size)
        if digest in _EMPTY_DIGESTS:
            return Mark.EMPTY
        if _worker_grams is not None and _worker_grams.met_in(document_text(document, self.tokenizer)):
            return Mark.CONTAMINATED
        return Mark.TRAIN


_worker_grams: Grams | None = None


def set_up_worker(grams: Grams | None) -> None:
    """Give this process the grams whose documents are dropped."""
    global _worker_grams
    _worker_grams = grams


def document_text(document: Document, tokenizer: TokenizerFiles | None) -> str:
    """Its words; ``tokenizer`` is needed for token ids, whose source is not read without one."""
    if isinstance(document, np.ndarray):
        assert tokenizer is not None
        return tokenizer.decode(document)
    if isinstance(document, Conversation):
        return "\n".join(str(message.get("content") or "") for message in document.messages)
    return document


def document_digest(document: Document) -> bytes:
    """16 bytes; equal for texts that differ in white space only, for equal token ids, and for equal chats."""
    if isinstance(document, str):
        content, kind = " ".join(document.split()).encode(), b""
    elif isinstance(document, np.ndarray):
        content, kind = document.astype("<u4").tobytes(), b"tokens"
    else:
        chat: dict[str, Any] = {"messages": list(document.messages), "tools": document.tools}
        content, kind = json.dumps(chat, sort_keys=True).encode(), b"chat"
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=kind).digest()


def _group_digest(document: Document) -> bytes | None:
    """Of what is held out together with it; None where that is the document alone."""
    if not isinstance(document, Conversation) or document.group is None:
        return None
    return hashlib.blake2b(document.group.encode(), digest_size=DIGEST_BYTES, person=b"group").digest()


_EMPTY_DIGESTS = {document_digest(empty) for empty in ("", np.empty(0, np.uint32), Conversation([]))}


def _rank(digest: bytes, seed: int) -> float:
    keyed = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(keyed, "little") >> 11) / (1 << 53)  # 53 bits: exact, and never 1


# --- on the disk -------------------------------------------------------------------------------------------

_COLUMNS = {"digests": (np.uint8, DIGEST_BYTES), "ranks": (np.float64, 1), "marks": (np.uint8, 1),
            "files": (np.uint32, 1), "chunks": (np.int64, 3)}  # fmt: skip
_PER_CHUNK = {"chunks"}


class _State(BaseModel):
    """survey.json: rows of the columns that count, and how far the survey is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    documents: int = Field(ge=0, lt=1 << 48)
    chunks: int = Field(ge=0, lt=1 << 48)
    complete: bool
    settled: bool


class Survey:
    """The files of one domain's survey, in a folder; an earlier run's are gone on with.

    ``digests``, ``ranks``, ``marks`` and ``files`` have a row for each document, and ``chunks`` one for each
    chunk: its place and its number of documents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        state = self._read_state()
        self.documents, self._chunks = state.documents, state.chunks
        self.complete = state.complete
        self.settled = state.settled
        """Marks are final."""
        self._open: dict[str, IO[bytes]] = {}

    @property
    def next_place(self) -> tuple[Place, int]:
        """Where to go on: a place, and how many of its first chunks are known already, one at most."""
        if not self._chunks:
            return Place(0, 0), 0
        file, chunk, _ = self.column("chunks")[-1].tolist()
        return Place(file, chunk), 1

    def append(self, place: Place, found: Surveyed) -> None:
        """Add the next chunk's documents; :meth:`save` makes it last."""
        chunk = np.array([*place, len(found.ranks)], np.int64)
        for name, rows in (*found._asdict().items(), ("chunks", chunk)):
            self._file(name).write(np.ascontiguousarray(rows).tobytes())
        self.documents += len(found.ranks)
        self._chunks += 1

    def save(self, *, complete: bool = False, settled: bool = False) -> None:
        """Bring what was appended to the disk and note that it is there."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        self.complete, self.settled = complete or settled, settled
        if complete:
            self.close()
        write_json(self._state_file, {"documents": self.documents, "chunks": self._chunks,
                                      "complete": self.complete, "settled": settled})  # fmt: skip

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open = {}

    def column(self, name: str, *, write: bool = False) -> np.ndarray:
        """A whole column, mapped and not read; [n] or [n, width]."""
        dtype, width = _COLUMNS[name]
        rows = self._chunks if name in _PER_CHUNK else self.documents
        if not rows:
            return np.empty((0, width) if width > 1 else 0, dtype)
        shape = (rows, width) if width > 1 else (rows,)
        return np.memmap(self.path(name), dtype, "r+" if write else "r", shape=shape)

    def blocks(self, *names: str, write: bool = False) -> Iterator[tuple[np.ndarray, ...]]:
        """The same ``BLOCK_DOCUMENTS`` rows of several columns, block after block."""
        for begin in range(0, self.documents, BLOCK_DOCUMENTS):
            # Mapped anew for each block: pages of earlier ones are let go
            yield tuple(self.column(name, write=write)[begin : begin + BLOCK_DOCUMENTS] for name in names)

    def count(self, mark: Mark) -> int:
        return sum(int((marks == mark).sum()) for (marks,) in self.blocks("marks"))

    def kept_digests(self) -> Iterator[np.ndarray]:
        """uint8 [n, 16] of the documents that are kept, block after block."""
        return (digests[marks <= Mark.EVAL] for digests, marks in self.blocks("digests", "marks"))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    @property
    def _state_file(self) -> Path:
        return self.folder / "survey.json"

    def _read_state(self) -> _State:
        """The last saved state; raises UserError when it cannot be what :meth:`save` wrote."""
        try:
            state = _State.model_validate(read_json(self._state_file, MAX_STATE_BYTES))
            for name, (dtype, width) in _COLUMNS.items():
                rows = state.chunks if name in _PER_CHUNK else state.documents
                if rows:
                    require_ordinary(self.path(name))
                if rows and self.path(name).stat().st_size < rows * width * np.dtype(dtype).itemsize:
                    raise ValueError(f"{self.path(name)} is too short")
        except FileNotFoundError:
            if self._state_file.exists():
                raise self._unreadable("a column is missing") from None
            return _State(documents=0, chunks=0, complete=False, settled=False)
        except ValidationError as error:
            raise self._unreadable(str(error.errors()[0]["msg"])) from None
        except (UserError, OSError, ValueError) as error:
            raise self._unreadable(str(error)) from None
        return state

    def _unreadable(self, why: str) -> UserError:
        return UserError(f"cannot go on with {self._state_file} ({why}): delete {self.folder.parent.parent}")

    def _file(self, name: str) -> IO[bytes]:
        """Open for appending, cut to the rows that were noted: a killed run may have written more."""
        if name not in self._open:
            dtype, width = _COLUMNS[name]
            rows = self._chunks if name in _PER_CHUNK else self.documents
            self._open[name] = open(self.path(name), "ab")  # noqa: SIM115  (closed by `close`)
            self._open[name].truncate(rows * width * np.dtype(dtype).itemsize)
        return self._open[name]


# --- which documents are held out --------------------------------------------------------------------------


@dataclass(frozen=True)
class Holdout:
    """Which of a domain's documents are held out: those of the lowest ranks."""

    fraction: float
    """Expected share."""
    most: int | None = None
    """Bound on their number."""
    exactly: int | None = None
    """Their number, in place of the two."""

    def rank_below(self, survey: Survey, domain: str) -> float:
        """Documents that are kept and whose rank is below it are held out.

        Raises:
            UserError: the domain has not more documents than are to be held out.
        """
        count = self.exactly if self.exactly is not None else self.most
        if count is None:
            return self.fraction
        lowest = _lowest_ranks(survey, count + 1)
        if self.exactly is None:
            return min(self.fraction, float(lowest[-1])) if len(lowest) > count else self.fraction
        if len(lowest) <= count:
            raise UserError(
                f"domain {domain} has {len(lowest):,} documents, not more than the {count:,} to hold out: "
                f"lower --eval-documents or add documents"
            )
        return float(lowest[-1])


def _lowest_ranks(survey: Survey, count: int) -> np.ndarray:
    """The ``count`` lowest ranks of documents that are kept, or all if fewer; sorted."""
    lowest = np.empty(0, np.float64)
    for ranks, marks in survey.blocks("ranks", "marks"):
        lowest = np.concatenate([lowest, ranks[marks <= Mark.EVAL]])
        if len(lowest) > count:
            lowest = np.partition(lowest, count - 1)[:count]
    return np.sort(lowest)


def hold_out(survey: Survey, below: float) -> None:
    """Mark the kept documents with ranks under ``below`` as EVAL, the others as TRAIN."""
    for ranks, marks in survey.blocks("ranks", "marks", write=True):
        kept = marks <= Mark.EVAL
        marks[kept] = np.where(ranks[kept] < below, Mark.EVAL, Mark.TRAIN)
