"""A first pass over a domain's documents: which are dropped, and which are held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from opmix_dist.data.catalogue import Split
from opmix_dist.errors import UserError

# In place of a rank, which is below 1
_DUPLICATE, _EMPTY = 2.0, 3.0


@dataclass(frozen=True)
class Survey:
    """One domain's documents, seen once.

    A document's rank is a number in [0, 1) that its content and the seed decide, so that the split depends
    neither on the order nor on the files. Ranks below ``eval_below`` are held out.
    """

    ranks: np.ndarray
    """float64 [documents]; what is dropped has a mark of 1 or more."""
    eval_below: float
    content_sha256: str

    @property
    def documents(self) -> int:
        """Number of documents that are kept."""
        return int((self.ranks < 1).sum())

    @property
    def duplicates(self) -> int:
        return int((self.ranks == _DUPLICATE).sum())

    @property
    def empty(self) -> int:
        return int((self.ranks == _EMPTY).sum())

    def splits(self) -> Iterator[Split]:
        """The split of each document that is kept, in order."""
        return ("eval" if rank < self.eval_below else "train" for rank in self.ranks[self.ranks < 1])

    def kept(self, documents: Iterable[str]) -> Iterator[str]:
        """Those of the source's ``documents`` that are kept; UserError when their number has changed."""
        try:
            for text, rank in zip(documents, self.ranks, strict=True):
                if rank < 1:
                    yield text
        except ValueError:
            raise UserError("a source changed while it was read: run again once its files rest") from None

    def train(self, documents: Iterable[str]) -> Iterator[str]:
        """Those of the source's ``documents`` that are kept and not held out."""
        pairs = zip(self.kept(documents), self.splits(), strict=True)
        return (text for text, split in pairs if split == "train")


def survey(
    documents: Iterable[str], seen: set[bytes], *, seed: int, eval_fraction: float, max_eval: int | None
) -> Survey:
    """Rank the documents of one domain.

    Args:
        documents: all of the domain.
        seen: digests of the documents kept so far, over all domains; those kept here are added.
        seed: of the split.
        eval_fraction: expected share of held-out documents.
        max_eval: bound on their number; those of the lowest ranks are taken.
    """
    ranks, content = array("d"), hashlib.sha256()
    for text in documents:
        digest = document_digest(text)
        if digest == _EMPTY_DIGEST or digest in seen:
            ranks.append(_EMPTY if digest == _EMPTY_DIGEST else _DUPLICATE)
            continue
        seen.add(digest)
        content.update(text.encode() + b"\0")
        ranks.append(_rank(digest, seed))
    found = np.array(ranks, dtype=np.float64)
    kept = found[found < 1]
    if max_eval is not None and kept.size > max_eval:
        eval_fraction = min(eval_fraction, float(np.partition(kept, max_eval)[max_eval]))
    return Survey(found, eval_fraction, content.hexdigest())


def document_digest(text: str) -> bytes:
    """16 bytes; equal for documents that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


_EMPTY_DIGEST = document_digest("")


def _rank(digest: bytes, seed: int) -> float:
    keyed = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(keyed, "little") >> 11) / (1 << 53)  # 53 bits: exact, and never 1
