"""Documents into samples: joined and cut into one length, or whole conversations fitted together.

Both packers take documents in order, in pieces of any size, and give the same samples however the pieces were
cut. What they hold back is bounded and can be saved. All is columnar: a piece is a few arrays, cheap to send
to another process, and no sample is an object until its shard is written.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opmix_dist.data.samples import DType, Sample

Arrays = dict[str, np.ndarray]
WINDOW_SAMPLES = 256
"""Conversations of about so many samples are fitted together: more would take memory and gain little."""


@dataclass(frozen=True)
class Ragged:
    """R rows of different lengths, end to end."""

    values: np.ndarray  # [sum of counts, ...]
    counts: np.ndarray  # int64 [R]

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        return cls(
            np.concatenate([part.values for part in parts]), np.concatenate([part.counts for part in parts])
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice) -> Ragged:
        """Neighbouring rows, without a copy."""
        begin, end, _ = rows.indices(len(self))
        skipped = int(self.counts[:begin].sum())
        return Ragged(
            self.values[skipped : skipped + int(self.counts[begin:end].sum())], self.counts[begin:end]
        )

    def take(self, order: np.ndarray) -> Ragged:
        """The rows of ``order``, int64 [R'], copied."""
        counts = self.counts[order]
        shift = starts(self.counts)[order] - starts(counts)
        return Ragged(self.values[np.repeat(shift, counts) + np.arange(counts.sum())], counts)

    def group(self, sizes: np.ndarray) -> Ragged:
        """Each ``sizes[i]`` neighbouring rows as one row."""
        borders = np.append(0, np.cumsum(sizes))
        return Ragged(self.values, np.diff(np.append(0, np.cumsum(self.counts))[borders]))

    def rows(self) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.counts).tolist()
        return (self.values[end - count : end] for end, count in zip(ends, self.counts.tolist(), strict=True))


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each row begins, int64 [R]."""
    return np.cumsum(counts) - counts


@dataclass(frozen=True)
class Documents:
    """Tokenised documents; ``spans`` [m, 2] are the ranges of a document's tokens that are learnt."""

    tokens: Ragged
    spans: Ragged | None = None

    @classmethod
    def none(cls, dtype: DType, *, spans: bool) -> Documents:
        empty = np.empty(0, np.int64)
        no_spans = Ragged(np.empty((0, 2), np.uint32), empty) if spans else None
        return cls(Ragged(np.empty(0, dtype), empty), no_spans)

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], spans: Sequence[np.ndarray] | None, dtype: DType) -> Documents:
        """From one array [n], and one of spans [m, 2], for each document."""
        if not tokens:
            return cls.none(dtype, spans=spans is not None)
        return cls(_ragged(tokens), None if spans is None else _ragged(spans))

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        spans = [part.spans for part in parts if part.spans is not None]
        return cls(Ragged.join([part.tokens for part in parts]), Ragged.join(spans) if spans else None)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Documents:
        return Documents(self.tokens[rows], None if self.spans is None else self.spans[rows])

    def arrays(self) -> Arrays:
        return _arrays({"tokens": self.tokens, "spans": self.spans})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Documents:
        return cls(_from_arrays(arrays, "tokens"), _maybe(arrays, "spans"))


@dataclass(frozen=True)
class Rows:
    """S samples, in columns; see ``samples.py`` for what they mean."""

    tokens: Ragged
    ends: Ragged
    spans: Ragged | None = None

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        spans = [part.spans for part in parts if part.spans is not None]
        return cls(
            Ragged.join([part.tokens for part in parts]),
            Ragged.join([part.ends for part in parts]),
            Ragged.join(spans) if spans else None,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.tokens[rows], self.ends[rows], None if self.spans is None else self.spans[rows])

    def stored_bytes(self) -> np.ndarray:
        """:attr:`Sample.stored_bytes` of each sample, int64 [S]."""
        marks = self.ends.counts * 4 + (0 if self.spans is None else self.spans.counts * 8)
        return self.tokens.counts * self.tokens.values.itemsize + marks + 20

    def samples(self) -> Iterator[Sample]:
        if self.spans is None:
            return (Sample(*row) for row in zip(self.tokens.rows(), self.ends.rows(), strict=True))
        columns = (self.tokens.rows(), self.ends.rows(), self.spans.rows())
        return (Sample(*row) for row in zip(*columns, strict=True))

    def arrays(self) -> Arrays:
        return _arrays({"tokens": self.tokens, "ends": self.ends, "spans": self.spans})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Rows:
        return cls(_from_arrays(arrays, "tokens"), _from_arrays(arrays, "ends"), _maybe(arrays, "spans"))


class Packer(Protocol):
    """Turns one split's documents into samples."""

    def add(self, documents: Documents) -> Rows:
        """The samples that are complete now, none perhaps."""

    def flush(self) -> Rows:
        """What is left."""

    def state(self) -> Arrays:
        """What is held back; :meth:`restore` of an equal packer takes it."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None: ...


class ConcatPacker:
    """Joins documents and cuts samples of T tokens; no token is lost, so the last sample is shorter."""

    def __init__(self, sequence_length: int, dtype: DType) -> None:
        self._length = sequence_length
        self._tokens = np.empty(0, dtype)  # [n], n < T
        self._ends = np.empty(0, np.int64)

    def add(self, documents: Documents) -> Rows:
        ends = len(self._tokens) + np.cumsum(documents.tokens.counts)
        self._tokens = np.concatenate([self._tokens, documents.tokens.values])
        self._ends = np.concatenate([self._ends, ends])
        return self._cut(len(self._tokens) // self._length)

    def flush(self) -> Rows:
        return self._cut(-(-len(self._tokens) // self._length))

    def _cut(self, samples: int) -> Rows:
        # Document ends are 1-based from the left: one at a sample's very end still belongs to it
        size = min(samples * self._length, len(self._tokens))
        own = int(np.searchsorted(self._ends, size, side="right"))
        place, local = np.divmod(self._ends[:own] - 1, self._length)
        lengths = np.full(samples, self._length, np.int64)
        lengths[-1:] -= samples * self._length - size
        rows = Rows(
            Ragged(self._tokens[:size], lengths),
            Ragged((local + 1).astype(np.uint32), np.bincount(place, minlength=samples).astype(np.int64)),
        )
        self._tokens, self._ends = self._tokens[size:].copy(), self._ends[own:] - size
        return rows

    def state(self) -> Arrays:
        return {"tokens": self._tokens, "ends": self._ends}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._tokens, self._ends = arrays["tokens"], arrays["ends"]


class BestFitPacker:
    """Fits whole documents of at most T tokens into samples of at most T, within windows of documents."""

    def __init__(self, sequence_length: int, dtype: DType) -> None:
        self._length = sequence_length
        self._held = Documents.none(dtype, spans=True)

    def add(self, documents: Documents) -> Rows:
        self._held = Documents.join([self._held, documents])
        packed = [self._pack(self._held[:0])]
        while size := self._window():
            packed.append(self._pack(self._held[:size]))
            self._held = self._held[size:]
        return Rows.join(packed)

    def flush(self) -> Rows:
        rows = self._pack(self._held)
        self._held = self._held[:0]
        return rows

    def _window(self) -> int:
        """Documents of the first complete window; 0 when there is none. Depends on the documents only."""
        reached = np.cumsum(self._held.tokens.counts)
        size = int(np.searchsorted(reached, WINDOW_SAMPLES * self._length)) + 1
        return size if size <= len(self._held) else 0

    def _pack(self, documents: Documents) -> Rows:
        assert documents.spans is not None
        bins = best_fit_decreasing(documents.tokens.counts, self._length)
        order = np.array([document for one in bins for document in one], np.int64)
        per_bin = np.array([len(one) for one in bins], np.int64)
        tokens, spans = documents.tokens.take(order), documents.spans.take(order)
        samples = tokens.group(per_bin)
        offsets = starts(tokens.counts) - np.repeat(starts(samples.counts), per_bin)
        ends = Ragged((offsets + tokens.counts).astype(np.uint32), per_bin)
        moved = spans.values + np.repeat(offsets, spans.counts)[:, None]
        return Rows(samples, ends, Ragged(moved.astype(np.uint32), spans.counts).group(per_bin))

    def state(self) -> Arrays:
        return self._held.arrays()

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._held = Documents.from_arrays(arrays)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Numbers of the documents in each bin: the longest first, each into the fullest bin that has room.

    Args:
        lengths: [D], none above ``capacity``.
        capacity: of a bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and number of each bin that is not full, sorted
    sizes = lengths.tolist()
    for document in np.argsort(-lengths, kind="stable").tolist():
        at = bisect.bisect_left(rooms, (sizes[document], -1))
        if at < len(rooms):
            room, number = rooms.pop(at)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(document)
        if room > sizes[document]:
            bisect.insort(rooms, (room - sizes[document], number))
    return bins


class ShardCutter:
    """Collects samples and gives a shard's worth of them at a time."""

    def __init__(self, shard_bytes: int) -> None:
        self._limit = shard_bytes
        self._parts: list[Rows] = []
        self._bytes = 0

    def add(self, rows: Rows) -> Iterator[Rows]:
        """Shards that are full now; a shard is closed by the sample that takes it to ``shard_bytes``."""
        if not len(rows):
            return
        self._parts.append(rows)
        self._bytes += int(rows.stored_bytes().sum())
        while self._bytes >= self._limit:
            joined = Rows.join(self._parts)
            reached = np.cumsum(joined.stored_bytes())
            size = int(np.searchsorted(reached, self._limit)) + 1
            self._parts, self._bytes = [joined[size:]], self._bytes - int(reached[size - 1])
            yield joined[:size]

    def flush(self) -> Iterator[Rows]:
        """The last shard, which is not full; none when there is nothing."""
        if any(map(len, self._parts)):
            yield Rows.join(self._parts)
        self._parts, self._bytes = [], 0

    def state(self) -> Arrays:
        return Rows.join(self._parts).arrays() if self._parts else {}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._parts = [Rows.from_arrays(arrays)] if arrays else []
        self._bytes = sum(int(part.stored_bytes().sum()) for part in self._parts)


def _ragged(rows: Sequence[np.ndarray]) -> Ragged:
    return Ragged(np.concatenate(rows), np.array([len(row) for row in rows], np.int64))


def _arrays(columns: Mapping[str, Ragged | None]) -> Arrays:
    present = {name: column for name, column in columns.items() if column is not None}
    return {
        **{f"{name}.values": column.values for name, column in present.items()},
        **{f"{name}.counts": column.counts for name, column in present.items()},
    }


def _from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> Ragged:
    return Ragged(arrays[f"{name}.values"], arrays[f"{name}.counts"])


def _maybe(arrays: Mapping[str, np.ndarray], name: str) -> Ragged | None:
    return _from_arrays(arrays, name) if f"{name}.values" in arrays else None
