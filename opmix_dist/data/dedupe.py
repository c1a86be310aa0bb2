"""Duplicates over any number of documents, in memory that does not grow with it.

Digests are spread over bucket files by their leading bits, so that equal ones meet in one bucket, and each
bucket is settled by itself: of equal digests the first stays.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from opmix_dist.bounded import open_ordinary
from opmix_dist.data.catalogue import DIGESTS_FILE, read_domain
from opmix_dist.data.survey import BLOCK_DOCUMENTS, DIGEST_BYTES, Mark, Survey
from opmix_dist.errors import UserError

BUCKET_DOCUMENTS = 1 << 21
"""Documents of a bucket, about; 24 bytes each on the disk and about 100 in memory."""
MAX_BUCKETS = 1 << 12


class Numbered(NamedTuple):
    """Digests uint8 [n, 16] of documents, and their numbers, int64 [n], ascending."""

    digests: np.ndarray
    numbers: np.ndarray


class Digests(Protocol):
    """A domain's documents that may have duplicates."""

    documents: int

    def numbered(self) -> Iterator[Numbered]: ...

    def drop(self, numbers: np.ndarray) -> None:
        """``numbers`` int64 [n] are duplicates."""


class PublishedDigests:
    """Those of a finished domain, which all stay."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.documents = file.stat().st_size // DIGEST_BYTES

    def numbered(self) -> Iterator[Numbered]:
        with open(open_ordinary(self._file), "rb") as file:
            begin = 0
            while block := file.read(BLOCK_DOCUMENTS * DIGEST_BYTES):
                digests = np.frombuffer(block, np.uint8).reshape(-1, DIGEST_BYTES)
                yield Numbered(digests, np.arange(begin, begin + len(digests)))
                begin += len(digests)

    def drop(self, numbers: np.ndarray) -> None:
        assert not len(numbers), "its documents were settled against all that come before them"


class SurveyedDigests:
    """Those of a domain that is being made; what is dropped is marked in its survey."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self.documents = survey.documents

    def numbered(self) -> Iterator[Numbered]:
        begin = 0
        for digests, marks in self._survey.blocks("digests", "marks"):
            kept = np.flatnonzero(marks <= Mark.EVAL)
            yield Numbered(digests[kept], begin + kept)
            begin += len(marks)

    def drop(self, numbers: np.ndarray) -> None:
        if len(numbers):
            self._survey.column("marks", write=True)[numbers] = Mark.DUPLICATE


def published_digests(root: Path, name: str) -> PublishedDigests:
    """Those of the finished domain ``name``; UserError when its file is not the one that it was made with."""
    file = root / name / DIGESTS_FILE
    if (
        not file.exists()
        or _sha256(file) != read_domain(root, name).digests_sha256
        or file.stat().st_size % DIGEST_BYTES
    ):
        raise UserError(f"{file} is missing or damaged: prepare {name} again with --overwrite")
    return PublishedDigests(file)


def drop_duplicates(domains: Sequence[Digests], scratch: Path) -> None:
    """Drop each document that an earlier one equals, within its domain or in one before it.

    Args:
        domains: in the order in which they keep a document that several have.
        scratch: a folder to make and remove; it takes 24 bytes a document.
    """
    borders = np.cumsum([0, *(domain.documents for domain in domains)])
    shutil.rmtree(scratch, ignore_errors=True)  # left by a kill
    scratch.mkdir(parents=True)
    try:
        for bucket in _spread(domains, borders, scratch):
            repeated = np.sort(_repeated(bucket))
            cuts = np.searchsorted(repeated, borders)
            for number, domain in enumerate(domains):
                domain.drop(repeated[cuts[number] : cuts[number + 1]] - borders[number])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _spread(domains: Iterable[Digests], borders: np.ndarray, scratch: Path) -> list[Path]:
    """Bucket files with rows of two halves of a digest and the document's number over all domains."""
    bits = min(MAX_BUCKETS, -(-int(borders[-1]) // BUCKET_DOCUMENTS)).bit_length()
    files = [scratch / f"{bucket:04}" for bucket in range(1 << bits)]
    for domain, base in zip(domains, borders, strict=False):
        for digests, numbers in domain.numbered():
            halves = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)
            rows = np.column_stack([halves, (numbers + base).astype(np.uint64)])
            buckets = (halves[:, 0] >> np.uint64(32)) >> np.uint64(32 - bits)
            order = np.argsort(buckets, kind="stable")
            ends = np.cumsum(np.bincount(buckets.astype(np.int64), minlength=len(files)))
            for file, part in zip(files, np.split(rows[order], ends[:-1]), strict=True):
                if len(part):
                    with open(file, "ab") as out:
                        out.write(part.tobytes())
    return [file for file in files if file.exists()]


def _repeated(bucket: Path) -> np.ndarray:
    """Numbers of the documents whose digest an earlier document of the bucket has, int64."""
    rows = np.fromfile(bucket, np.uint64).reshape(-1, 3)
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: equal digests stay in the order of their numbers
    halves = rows[order, :2]
    same = np.flatnonzero((halves[1:] == halves[:-1]).all(axis=1)) + 1
    return rows[order[same], 2].astype(np.int64)


def _sha256(file: Path) -> str:
    with open(open_ordinary(file), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
