"""What a worker does with one shard: compare its bytes with the index, decode and check every sample.

It also gives the digest of each document that lies in the shard as a whole, and the tokens of the two that
may not, so that who has all shards of a split can join them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opmix_dist.data.catalogue import DomainInfo
from opmix_dist.data.packing import Ragged
from opmix_dist.data.samples import Sample
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore, file_hash, one_line, size_of
from opmix_dist.data.survey import DIGEST_BYTES
from opmix_dist.data.verify.unpack import UnpackError, unpack
from opmix_dist.errors import UserError

OPENING_TOKENS = 16
"""Of each document, kept to show its first words."""
LISTED_SAMPLES = 3
"""Faulty samples of a shard that get a line of their own."""


@dataclass(frozen=True)
class SplitPlace:
    """A split as it is named to workers. Workers keep nothing of a shard but what a store's cache holds."""

    local: Path
    """Where the split is read: its folder, or its place in a store's cache."""
    store: ShardStore | None
    info: DomainInfo
    eos_id: int | None
    original: Path | None = None
    """The folder of compressed shards; ``local`` then holds decompressed ones, while they are read."""


class Piece(NamedTuple):
    """Tokens of one document, or a part of it."""

    tokens: np.ndarray  # [n]
    sample: int  # in which it begins; a number within the split


class DocumentDigests(NamedTuple):
    """Of n whole documents, in order."""

    digests: np.ndarray  # uint8 [n, 16]
    samples: np.ndarray  # int64 [n], in which each begins
    openings: Ragged  # the first tokens of each, OPENING_TOKENS at most


@dataclass(frozen=True)
class ShardFindings:
    """What is in a shard; with faults of its file, or of how samples are stored, nothing is."""

    faults: list[str] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    documents: int = 0
    """That end here."""
    whole: DocumentDigests | None = None
    """Documents that begin and end here, without the first to end; None: the shard was not read."""
    head: Piece | None = None
    """Up to the first document's end; None where none ends here, and ``tail`` is all."""
    tail: Piece | None = None
    """Behind the last document's end; None when the shard ends with a document."""


def check_shard(place: SplitPlace, shard: int) -> ShardFindings:
    """Never raises for what is wrong with the shard: it becomes a fault."""
    split = _opened(place.local, place.store)
    raw = split.local / split.files[shard].raw_name
    shown = (place.original or place.local) / split.files[shard].stored_name
    try:
        if place.original is not None:
            unpack(shown, split.files[shard], raw)
        samples = [split.read(number) for number in _numbers(split, shard)]
        stored = int(np.fromfile(raw, "<u4", count=1)[0])
        copies = [] if place.original is None else list(_copy_faults(split, shard, place.original))
    except UnpackError as error:
        return ShardFindings([f"shard {shown}: {error}; copy it again or prepare the domain again"])
    except UserError as error:
        # the place where a shard was decompressed, or is cached under another name, says nothing to anyone
        what = str(error).removeprefix(f"shard {raw}: ")
        return ShardFindings([f"shard {shown}: {what}"])
    except Exception as error:
        # of a decoder, on bytes that no writer wrote: the other shards are still to be checked
        return ShardFindings([f"shard {shown}: cannot be read ({type(error).__name__}: {one_line(error)})"])
    finally:
        if place.original is not None:
            raw.unlink(missing_ok=True)
    faults = [f"shard {shown}: {what}" for what in _sample_faults(samples, stored, place.info)]
    return _findings(samples, _numbers(split, shard).start, place.eos_id, copies + faults)


def sample_fault(sample: Sample, info: DomainInfo) -> str | None:
    """Why a sample is none of the domain's, or None."""
    n, ends = len(sample.tokens), sample.ends.astype(np.int64)
    if not 1 <= n <= info.sequence_length:
        return f"has {n} tokens, not 1 to {info.sequence_length}"
    if sample.tokens.dtype != info.dtype:
        return f"has tokens of {sample.tokens.dtype}, the domain has {info.dtype}"
    if sample.tokens.max() >= info.vocab_size:
        return f"has token {sample.tokens.max()}, beyond the vocabulary of {info.vocab_size}"
    if (np.diff(ends, prepend=0) < 1).any() or (ends > n).any():
        return f"has document ends that do not ascend within 1 to {n}"
    if info.packing == "best_fit" and (not len(ends) or ends[-1] != n):
        return "cuts its last conversation off"
    return _spans_fault(sample)


def _spans_fault(sample: Sample) -> str | None:
    if sample.spans is None:
        return None
    borders = sample.spans.astype(np.int64)
    if (borders[:, 0] >= borders[:, 1]).any() or (borders[1:, 0] < borders[:-1, 1]).any():
        return "has ranges of learnt tokens that are empty, or overlap"
    if (borders > len(sample.tokens)).any():
        return "has ranges of learnt tokens outside of it"
    return None


@lru_cache(maxsize=8)
def _opened(local: Path, store: ShardStore | None) -> ShardedSplit:
    return ShardedSplit(local, store, verify=True)


def forget_opened() -> None:
    """Read indexes anew, and compare shards with them again."""
    _opened.cache_clear()


def _numbers(split: ShardedSplit, shard: int) -> range:
    """Of the shard's samples, within the split."""
    begin = int(split.shard_sizes[:shard].sum())
    return range(begin, begin + int(split.shard_sizes[shard]))


def _copy_faults(split: ShardedSplit, shard: int, original: Path) -> Iterator[str]:
    """Of the decompressed copy that a training on this folder has left beside the compressed file."""
    file = split.files[shard]
    copy = original / file.raw_name
    size = size_of(copy)
    if size >= 0 and (size != file.raw_bytes or file_hash(copy) != file.raw_hash):
        yield f"shard {copy}: is not what its compressed file holds; delete this copy, which is made again"


def _sample_faults(samples: list[Sample], stored: int, info: DomainInfo) -> Iterator[str]:
    """Of the samples that the index counts; the shard's own table says that it has ``stored``."""
    if stored != len(samples):
        yield f"holds {stored} samples, its index says {len(samples)}"
    wrong = [(row, fault) for row, one in enumerate(samples) if (fault := sample_fault(one, info))]
    for row, fault in wrong[:LISTED_SAMPLES]:
        yield f"sample {row} {fault}; prepare the domain again"
    if len(wrong) > LISTED_SAMPLES:
        yield f"{len(wrong) - LISTED_SAMPLES} more of its samples are faulty"


def _findings(samples: list[Sample], first: int, eos_id: int | None, faults: list[str]) -> ShardFindings:
    lengths = np.array([len(sample.tokens) for sample in samples], np.int64)
    begins = np.cumsum(lengths) - lengths
    tokens = np.concatenate([sample.tokens for sample in samples])
    ends = np.concatenate(
        [begin + sample.ends.astype(np.int64) for begin, sample in zip(begins, samples, strict=True)]
    )

    def piece(begin: int, end: int) -> Piece | None:
        return Piece(tokens[begin:end].copy(), first + _sample_at(begins, begin)) if begin < end else None

    whole = [Piece(tokens[a:b], first + _sample_at(begins, a)) for a, b in pairwise(ends)]
    return ShardFindings(
        faults=faults,
        samples=len(samples),
        tokens=len(tokens),
        documents=len(ends),
        whole=digest(whole, eos_id),
        head=piece(0, int(ends[0])) if len(ends) else None,
        tail=piece(int(ends[-1]) if len(ends) else 0, len(tokens)),
    )


def _sample_at(begins: np.ndarray, place: int) -> int:
    return int(np.searchsorted(begins, place, side="right")) - 1


def digest(documents: list[Piece], eos_id: int | None) -> DocumentDigests:
    """Digests of token ids. The EOS that ends a document does not count: not every source has one."""
    digests = bytearray()
    for tokens, _ in documents:
        ids = tokens[:-1] if len(tokens) and tokens[-1] == eos_id else tokens
        digests += blake2b(ids.astype("<u4").tobytes(), digest_size=DIGEST_BYTES).digest()
    return DocumentDigests(
        np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        np.array([sample for _, sample in documents], np.int64),
        _openings([tokens[:OPENING_TOKENS] for tokens, _ in documents]),
    )


def _openings(tokens: list[np.ndarray]) -> Ragged:
    counts = np.array([len(one) for one in tokens], np.int64)
    return Ragged(np.concatenate(tokens) if tokens else np.empty(0, np.uint16), counts)
