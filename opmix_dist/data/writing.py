"""The second pass of one domain: tokens are packed into samples, samples into shards.

Everything happens in the order of the source, in one process; only whole shards go to the workers. Now and
then what is held is saved, in ``work/written.safetensors``, so that a killed run goes on from there. When
that happens changes no byte of the result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as safetensors_bytes

from opmix_dist.atomic import write_bytes
from opmix_dist.data.catalogue import (
    DIGESTS_FILE,
    DOMAIN_FILE,
    FORMAT_VERSION,
    SOURCES_FILE,
    SPLITS,
    DomainInfo,
    Packing,
    SourceInfo,
    Split,
    SplitInfo,
)
from opmix_dist.data.encode import Encoded
from opmix_dist.data.packing import Arrays, BestFitPacker, ConcatPacker, Documents, Packer, Rows, ShardCutter
from opmix_dist.data.samples import INDEX_FILE, Compression, DType, write_index, write_shard
from opmix_dist.data.source import SourceFile
from opmix_dist.data.staging import Settings, Staging, writing
from opmix_dist.data.survey import Mark, Survey
from opmix_dist.data.tokenizer import TokenizerFiles
from opmix_dist.data.workers import Pool
from opmix_dist.data.written import RECORD_FILE, Counts, read_record
from opmix_dist.errors import UserError

Entry = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How samples are made and stored, the same in all domains of one ingest but for ``packing``."""

    tokenizer: TokenizerFiles
    sequence_length: int
    packing: Packing
    compression: Compression
    shard_bytes: int

    @property
    def dtype(self) -> DType:
        return self.tokenizer.dtype

    def packer(self) -> Packer:
        kind = BestFitPacker if self.packing == "best_fit" else ConcatPacker
        return kind(self.sequence_length, self.dtype)


def write_rows(folder: Path, number: int, rows: Rows, form: Form) -> Entry:
    """Write one shard, in a worker; returns its entry for the index."""
    spans = rows.spans is not None
    return write_shard(
        folder, number, rows.samples(), dtype=form.dtype, spans=spans, compression=form.compression
    )


class SplitWriter:
    """One split on its way to shards."""

    def __init__(self, folder: Path, form: Form, pool: Pool) -> None:
        self._folder, self._form, self._pool = folder, form, pool
        self._packer, self._cutter = form.packer(), ShardCutter(form.shard_bytes)
        self.samples = self.tokens = self.documents = 0
        self.shards: list[Entry | Future[Entry]] = []
        self._under_way: deque[Future[Entry]] = deque()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, documents: Documents) -> None:
        self.documents += len(documents)
        self._take(self._packer.add(documents))

    def close(self) -> None:
        """Hand the rest to the workers."""
        self._take(self._packer.flush())
        for rows in self._cutter.flush():
            self._submit(rows)

    def finish(self) -> SplitInfo:
        """Write the index once all shards are there."""
        write_index(self._folder, self.entries(self.shards))
        return SplitInfo(samples=self.samples, tokens=self.tokens, documents=self.documents)

    def entries(self, shards: Sequence[Entry | Future[Entry]]) -> list[Entry]:
        """Of the index; waits for the shards that are being written."""
        return [self._pool.result(shard) if isinstance(shard, Future) else shard for shard in shards]

    def _take(self, rows: Rows) -> None:
        self.samples += len(rows)
        self.tokens += len(rows.tokens.values)
        for shard in self._cutter.add(rows):
            self._submit(shard)

    def _submit(self, rows: Rows) -> None:
        while len(self._under_way) > self._pool.workers or (self._under_way and self._under_way[0].done()):
            self._pool.result(self._under_way.popleft())  # bounds what waits in memory, and raises early
        future = self._pool.submit(write_rows, self._folder, len(self.shards), rows, self._form)
        self._under_way.append(future)
        self.shards.append(future)

    def state(self) -> tuple[dict[str, int], Arrays]:
        arrays = {f"packer.{name}": array for name, array in self._packer.state().items()}
        arrays |= {f"cutter.{name}": array for name, array in self._cutter.state().items()}
        return {name: getattr(self, name) for name in _COUNTS}, arrays

    def restore(self, counts: Counts, arrays: Arrays, shards: Sequence[Entry]) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(counts, name))
        self._packer.restore(_under("packer.", arrays))
        self._cutter.restore(_under("cutter.", arrays))
        self.shards = list(shards)


_COUNTS = ("samples", "tokens", "documents")


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _Snapshot:
    """The state at one moment; it counts once the shards that it names are written."""

    state: dict[str, Any]
    arrays: Arrays
    shards: dict[Split, list[Entry | Future[Entry]]]

    @property
    def ready(self) -> bool:
        return all(map(_all_written, self.shards.values()))


def _all_written(shards: Sequence[Entry | Future[Entry]]) -> bool:
    return all(shard.done() for shard in shards if isinstance(shard, Future))


@dataclass
class DomainWriter:
    """A domain on its way to its folder: ``add`` each chunk in order, ``close``, ``publish``.

    Args:
        record_seconds: least time between two records of what is done.
    """

    name: str
    staging: Staging
    survey: Survey
    form: Form
    pool: Pool
    record_seconds: float
    chunks: int = 0
    """Chunks that are done, those of earlier runs too."""
    tokens_cut: int = 0
    unlearnt: int = 0
    _snapshot: _Snapshot | None = None
    _recorded: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        with writing(self.staging.target):
            self._splits = {
                split: SplitWriter(self.staging.folder / split, self.form, self.pool) for split in SPLITS
            }
            if not self._restore():
                self._save(self._take_snapshot())  # a later run knows the tokenizer by it

    @property
    def documents(self) -> int:
        """Documents that are done, those of earlier runs too."""
        return self.unlearnt + sum(writer.documents for writer in self._splits.values())

    def add(self, encoded: Encoded) -> None:
        for split, documents in encoded.documents.items():
            self._splits[split].add(documents)
        self.tokens_cut += encoded.tokens_cut
        self.unlearnt += encoded.unlearnt
        self.chunks += 1
        if self._snapshot is None and time.monotonic() - self._recorded >= self.record_seconds:
            self._snapshot = self._take_snapshot()
        if self._snapshot is not None and self._snapshot.ready:
            self._save(self._snapshot)
            self._snapshot, self._recorded = None, time.monotonic()

    def close(self) -> None:
        """No chunk follows; the last shards go to the workers."""
        for writer in self._splits.values():
            writer.close()

    @property
    def closed(self) -> bool:
        """After ``close``: whether ``publish`` need not wait for a shard."""
        return all(_all_written(writer.shards) for writer in self._splits.values())

    def publish(
        self, settings: Settings, seed: int, names: Sequence[str], files: Sequence[SourceFile]
    ) -> DomainInfo:
        """Write what describes the domain, and move it to its place.

        Raises:
            UserError: a split is empty, or a file cannot be written.
        """
        folder = self.staging.folder
        with writing(self.staging.target):
            splits = {split: writer.finish() for split, writer in self._splits.items()}
            _require_samples(self.name, splits)
            form, tokenizer, count = self.form, self.form.tokenizer, self.survey.count
            info = DomainInfo(
                format_version=FORMAT_VERSION,
                name=self.name,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                sequence_length=form.sequence_length,
                packing=form.packing,
                dtype=form.dtype,
                compression=form.compression,
                splits=splits,
                documents_duplicate=count(Mark.DUPLICATE),
                documents_empty=count(Mark.EMPTY),
                documents_contaminated=count(Mark.CONTAMINATED),
                documents_unlearnt=self.unlearnt,
                tokens_dropped=self.tokens_cut,
                sources=list(names),
                sources_sha256=_write(folder / SOURCES_FILE, _source_lines(self.survey, files)),
                digests_sha256=_write(
                    folder / DIGESTS_FILE, (block.tobytes() for block in self.survey.kept_digests())
                ),
                content_sha256=_indexes_sha256(folder),
                seed=seed,
                settings=settings,
            )
            write_bytes(folder / DOMAIN_FILE, info.model_dump_json(indent=1).encode())
        self.staging.publish()
        return info

    def _take_snapshot(self) -> _Snapshot:
        states = {split: writer.state() for split, writer in self._splits.items()}
        state = {
            "tokenizer": self.form.tokenizer.fingerprint,
            "chunks": self.chunks,
            "tokens_cut": self.tokens_cut,
            "unlearnt": self.unlearnt,
            "counts": {split: counts for split, (counts, _) in states.items()},
        }
        arrays = {f"{split}.{name}": a for split, (_, held) in states.items() for name, a in held.items()}
        shards = {split: list(writer.shards) for split, writer in self._splits.items()}
        return _Snapshot(state, arrays, shards)

    def _save(self, snapshot: _Snapshot) -> None:
        shards = {split: self._splits[split].entries(found) for split, found in snapshot.shards.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in snapshot.arrays.items()}
        text = json.dumps({**snapshot.state, "shards": shards})
        write_bytes(self.staging.work / RECORD_FILE, safetensors_bytes(arrays, {"state": text}))

    def _restore(self) -> bool:
        record = read_record(self.staging.work)
        if record is None or record.state.tokenizer != self.form.tokenizer.fingerprint:
            return False
        state = record.state
        self.chunks, self.tokens_cut, self.unlearnt = state.chunks, state.tokens_cut, state.unlearnt
        for split, writer in self._splits.items():
            writer.restore(state.counts[split], _under(f"{split}.", record.arrays), state.shards[split])
        return True


def _require_samples(name: str, splits: Mapping[Split, SplitInfo]) -> None:
    for split, info in splits.items():
        if not info.samples:
            raise UserError(
                f"empty domain: {name} has no conversation with a learnt token in its {split} split: add "
                f"some, raise --sequence-length, or mend a --chat-template that leaves out what they say"
            )


def _write(file: Path, parts: Iterator[bytes]) -> str:
    """Write ``parts`` and return the file's sha256."""
    state = hashlib.sha256()
    with open(file, "wb") as out:
        for part in parts:
            state.update(part)
            out.write(part)
    return state.hexdigest()


def _indexes_sha256(folder: Path) -> str:
    state = hashlib.sha256()
    for split in SPLITS:
        state.update((folder / split / INDEX_FILE).read_bytes())
    return state.hexdigest()


def _source_lines(survey: Survey, files: Sequence[SourceFile]) -> Iterator[bytes]:
    """The lines of ``sources.jsonl``; a file's documents are neighbours."""
    at, documents, state = 0, 0, hashlib.sha256()

    def line() -> bytes:
        info = SourceInfo(**files[at]._asdict(), documents=documents, sha256=state.hexdigest())
        return info.model_dump_json().encode() + b"\n"

    for digests, numbers in survey.blocks("digests", "files"):
        borders = np.append(np.flatnonzero(np.diff(numbers)) + 1, len(numbers))
        begin = 0
        for end in borders.tolist():
            while at < numbers[begin]:
                yield line()
                at, documents, state = at + 1, 0, hashlib.sha256()
            state.update(digests[begin:end].tobytes())
            documents += end - begin
            begin = end
    while at < len(files):
        yield line()
        at, documents, state = at + 1, 0, hashlib.sha256()
