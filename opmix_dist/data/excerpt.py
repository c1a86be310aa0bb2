"""Single samples as text: for ``opmix data inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opmix_dist.data.batch import collate
from opmix_dist.data.catalogue import Catalogue, Split
from opmix_dist.data.printable import printable
from opmix_dist.data.remote import open_catalogue
from opmix_dist.data.samples import Sample
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore
from opmix_dist.data.verify.shard import sample_fault
from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Passage:
    """Tokens of one document, in one sample, that are alike."""

    text: str
    """Printable. A character whose bytes another passage has a part of shows as U+FFFD."""
    tokens: int
    learnt: bool
    """Whether they count in the loss, as far as the domain has a say."""
    ends_document: bool


@dataclass(frozen=True)
class Excerpt:
    """One sample."""

    domain: str
    split: Split
    sample: int
    """Its number in the split."""
    file: str
    """The shard, in the folder or under the URL that was prepared."""
    row: int
    """Its number in the file."""
    tokens: int
    documents: int
    """Of which it has a token."""
    targets: int
    """Tokens that count in the loss."""
    targets_masked: int
    """The same with ``data.mask_documents``, which predicts no document's first token."""
    chat: bool
    """The domain says what is learnt."""
    passages: list[Passage]
    fault: str | None
    """Why training refuses it."""


@contextmanager
def leaving_no_trace(catalogue: Catalogue) -> Iterator[Catalogue]:
    """The catalogue, such that reading it writes nothing into a folder of compressed shards.

    Those are decompressed in a temporary folder; a store's cache is what it is for.
    """
    if catalogue.store or all(info.compression == "none" for info in catalogue.domains.values()):
        yield catalogue
        return
    with tempfile.TemporaryDirectory(prefix="opmix-inspect-") as scratch:
        root = str(catalogue.root)
        yield open_catalogue(root, catalogue.names, ShardStore(root, Path(scratch), attempts=1))


def choose(samples: int, count: int, seed: int, domain: str) -> list[int]:
    """``count`` different ones of a split's samples, ascending; all of them if there are fewer."""
    rng = np.random.default_rng(derive_seed(seed, "inspect", domain))
    return sorted(rng.choice(samples, size=min(count, samples), replace=False).tolist())


def excerpt(
    catalogue: Catalogue, tokenizer: PreTrainedTokenizerFast, domain: str, split: Split, number: int
) -> Excerpt:
    """Read and decode one sample.

    Raises:
        UserError: there is no such sample, or it cannot be read.
    """
    shards = ShardedSplit(catalogue.split_dir(domain, split), catalogue.store)
    if not 0 <= number < len(shards):
        raise UserError(
            f"--sample {number}: the {split} split of {domain} has samples 0 to {len(shards) - 1}"
        )
    sample = shards.read(number)
    ends = np.cumsum(shards.shard_sizes)
    shard = int(np.searchsorted(ends, number, side="right"))
    root = catalogue.store.remote.rstrip("/") if catalogue.store else catalogue.root
    passages = [
        Passage(printable(_text(tokenizer, ids)), len(ids), learnt, ends_document)
        for ids, learnt, ends_document in _cut(sample)
    ]
    return Excerpt(
        domain=domain,
        split=split,
        sample=number,
        file=f"{root}/{shards.folder}/{shards.files[shard].stored_name}",
        row=int(number - (ends[shard] - shards.shard_sizes[shard])),
        tokens=len(sample.tokens),
        documents=sum(passage.ends_document for passage in passages) + (not passages[-1].ends_document),
        targets=_targets(sample, mask_documents=False),
        targets_masked=_targets(sample, mask_documents=True),
        chat=sample.spans is not None,
        passages=passages,
        fault=sample_fault(sample, catalogue.domains[domain]),
    )


def _text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # of one row
    return text


def _targets(sample: Sample, *, mask_documents: bool) -> int:
    return int(collate([sample], len(sample.tokens), mask_documents=mask_documents).targets[0])


def _cut(sample: Sample) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """Ids, whether learnt, and whether a document ends, of stretches that are alike."""
    n = len(sample.tokens)
    spans = np.array([[0, n]]) if sample.spans is None else sample.spans
    learnt = np.zeros(n, bool)
    for begin, end in spans.tolist():
        learnt[begin:end] = True
    borders = np.unique([0, n, *sample.ends.tolist(), *spans.ravel().tolist()])
    ends = set(sample.ends.tolist())
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        yield sample.tokens[begin:end], bool(learnt[begin]), end in ends
