"""Documents that are there more than once, by content, whatever samples and shards they are cut into."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opmix_dist.data.dedupe import PublishedDigests, drop_duplicates
from opmix_dist.data.survey import DIGEST_BYTES
from opmix_dist.data.verify.report import DomainReport, Duplicate
from opmix_dist.data.verify.shard import DocumentDigests, Piece, ShardFindings, digest


class Joiner:
    """Joins the documents of one split that go on from shard to shard. Feed it every shard, in order."""

    def __init__(self, eos_id: int | None) -> None:
        self._eos_id = eos_id
        self._held: list[Piece] | None = []  # of the document that goes on; None: its beginning is unreadable

    def feed(self, found: ShardFindings) -> Iterator[DocumentDigests]:
        """Documents that end in this shard; those whose beginning could not be read are left out."""
        if found.whole is None:
            self._held = None
            return
        if found.head is not None:
            if self._held is not None:
                yield digest([_joined([*self._held, found.head])], self._eos_id)
            self._held = []
            yield found.whole
        if found.tail is not None and self._held is not None:
            self._held.append(found.tail)

    @property
    def unended(self) -> int | None:
        """After the last shard: the sample in which a document begins that has no end."""
        return self._held[0].sample if self._held else None


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(np.concatenate([piece.tokens for piece in pieces]), pieces[0].sample)


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Where a held-out document was first seen."""

    report: DomainReport
    sample: int


class HeldOut:
    """The held-out documents of all domains, in memory: about 200 bytes each.

    Add those of every domain before asking for train documents.

    Args:
        text: tokens to their first words.
    """

    def __init__(self, text: Callable[[np.ndarray], str]) -> None:
        self._text = text
        self._seen: dict[bytes, _HeldOut] = {}
        self._in_train: set[bytes] = set()
        self._sorted = np.empty(0, np.uint64)  # first halves of the digests, once all are there

    def add(self, report: DomainReport, documents: DocumentDigests) -> None:
        """Note a domain's held-out documents, and in its report those that were seen before."""
        for key, sample, opening in _rows(documents, np.arange(len(documents.samples))):
            earlier = self._seen.get(key)
            if earlier is None:
                self._seen[key] = _HeldOut(report, sample)
                continue
            words = self._text(opening)
            report.within_eval.append(
                Duplicate(report.name, sample, earlier.report.name, "eval", earlier.sample, words)
            )

    def compare(self, report: DomainReport, documents: DocumentDigests) -> None:
        """Note, in the held-out documents' reports, which are among a domain's train documents."""
        for key, sample, opening in _rows(documents, self._candidates(documents)):
            held_out = self._seen.get(key)
            if held_out is None or key in self._in_train:
                continue
            self._in_train.add(key)
            words = self._text(opening)
            held_out.report.in_train.append(
                Duplicate(held_out.report.name, held_out.sample, report.name, "train", sample, words)
            )

    def _candidates(self, documents: DocumentDigests) -> np.ndarray:
        """Numbers of the documents that may be held out: there are a thousand times as many that are not."""
        if len(self._sorted) != len(self._seen):
            keys = np.frombuffer(b"".join(self._seen), np.uint8).reshape(-1, DIGEST_BYTES)
            self._sorted = np.sort(_halves(keys))
        halves = _halves(documents.digests)
        places = np.searchsorted(self._sorted, halves)
        places[places == len(self._sorted)] = 0
        return np.flatnonzero(self._sorted[places] == halves) if len(self._sorted) else np.empty(0, np.int64)


def _halves(digests: np.ndarray) -> np.ndarray:
    """First halves of digests [n, 16], uint64 [n]."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()


def _rows(documents: DocumentDigests, numbers: np.ndarray) -> Iterator[tuple[bytes, int, np.ndarray]]:
    """Digest, sample and opening of the documents with these numbers, int64 [n]."""
    keys = (row.tobytes() for row in documents.digests[numbers])
    return zip(
        keys, documents.samples[numbers].tolist(), documents.openings.take(numbers).rows(), strict=True
    )


class TrainDigests:
    """Digests of all train documents on the disk, 16 bytes each, to find those that are there repeatedly."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)

    def add(self, report: DomainReport, documents: DocumentDigests) -> None:
        with open(self._folder / report.name, "ab") as out:
            out.write(documents.digests.tobytes())

    def files(self, reports: Sequence[DomainReport]) -> dict[str, Path]:
        """By domain; one without a document that could be read has none."""
        paths = {report.name: self._folder / report.name for report in reports}
        return {name: path for name, path in paths.items() if path.exists()}


class _Counted(PublishedDigests):
    """Counts what would be dropped."""

    repeated = 0

    def drop(self, numbers: np.ndarray) -> None:
        self.repeated += len(numbers)


def count_repeated(reports: Sequence[DomainReport], files: dict[str, Path]) -> None:
    """Note in each report how many digests of its file an earlier one equals, in the reports' order.

    Memory does not grow with the number of documents; the disk takes 24 bytes for each.
    """
    counted = {report.name: _Counted(files[report.name]) for report in reports if report.name in files}
    if any(digests.documents for digests in counted.values()):
        with tempfile.TemporaryDirectory(prefix="opmix-") as scratch:
            drop_duplicates(list(counted.values()), Path(scratch) / "buckets")
    for report in reports:
        if report.name in counted:
            report.repeated = counted[report.name].repeated
