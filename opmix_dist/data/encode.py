"""What a worker does with a chunk in the second pass: token ids of the documents that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opmix_dist.data.catalogue import SPLITS, Split
from opmix_dist.data.packing import Documents
from opmix_dist.data.source import Chunk, Conversation, Document
from opmix_dist.data.survey import Mark
from opmix_dist.data.tokenizer import TokenizerFiles, check_ids
from opmix_dist.data.workers import FileFault
from opmix_dist.errors import UserError

BATCH_DOCUMENTS = 64
BATCH_CHARS = 1 << 18
QUOTED_CHARS = 40
SOURCE_CHANGED = "a source changed while it was read: run again once its files rest"

_SPLIT_OF: dict[int, Split] = {Mark.TRAIN: "train", Mark.EVAL: "eval"}


class Encoded(NamedTuple):
    """The kept documents of a chunk, in order."""

    documents: dict[Split, Documents]
    tokens_cut: int  # off conversations longer than a sample
    unlearnt: int  # conversations without a token that is learnt

    @property
    def tokens(self) -> int:
        return sum(len(documents.tokens.values) for documents in self.documents.values())


class _Kept(NamedTuple):
    split: Split
    file: int
    document: Document


@dataclass(frozen=True)
class Encoder:
    """How a domain's documents become tokens; picklable.

    Texts and token ids get EOS at their end. Conversations are rendered by the chat template, which ends them
    in its own way, and are cut after ``sequence_length`` tokens.
    """

    tokenizer: TokenizerFiles
    sequence_length: int
    chat: bool

    def __call__(self, chunk: Chunk, marks: np.ndarray) -> Encoded:
        """Tokenise the documents of ``chunk`` that ``marks`` [n] keep.

        Raises:
            UserError: the chunk has not n documents.
            FileFault: a document cannot be used.
        """
        kept = _kept(chunk, marks)
        return self._encode_chats(kept) if self.chat else self._encode_texts(kept)

    def _encode_texts(self, kept: Iterator[_Kept]) -> Encoded:
        tokens: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        for batch in _batches(kept):
            for (split, _, _), ids in zip(batch, self._encode(batch), strict=True):
                tokens[split].append(ids)
        dtype = self.tokenizer.dtype
        return Encoded({split: Documents.of(ids, None, dtype) for split, ids in tokens.items()}, 0, 0)

    def _encode(self, batch: list[_Kept]) -> Iterator[np.ndarray]:
        """Ids [n + 1] of each document, EOS last."""
        eos, dtype = self.tokenizer.eos_id, self.tokenizer.dtype
        texts = [document for _, _, document in batch if isinstance(document, str)]
        encodings = iter(self.tokenizer.backend().encode_batch_fast(texts, add_special_tokens=False))
        for _, file, document in batch:
            if isinstance(document, str):
                ids = next(encodings).ids
            elif isinstance(document, np.ndarray):
                check_ids(document, file, self.tokenizer.vocab_size)
                ids = document
            else:
                raise FileFault(file, " holds chats: pass it with --chat-domain in place of --domain")
            yield np.append(np.array(ids, dtype), np.array(eos, dtype))

    def _encode_chats(self, kept: Iterator[_Kept]) -> Encoded:
        tokens: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        spans: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        cut = unlearnt = 0
        for split, file, document in kept:
            ids, learnt = self._render(file, document)
            cut += max(0, len(ids) - self.sequence_length)
            learnt = clip_spans(learnt, self.sequence_length)
            if not len(learnt):
                unlearnt += 1
                continue
            tokens[split].append(ids[: self.sequence_length].astype(self.tokenizer.dtype))
            spans[split].append(learnt)
        dtype = self.tokenizer.dtype
        documents = {split: Documents.of(tokens[split], spans[split], dtype) for split in SPLITS}
        return Encoded(documents, cut, unlearnt)

    def _render(self, file: int, document: Document) -> tuple[np.ndarray, np.ndarray]:
        from opmix_dist.data.chat import render

        if not isinstance(document, Conversation):
            raise FileFault(file, " holds no chats: pass it with --domain in place of --chat-domain")
        opening = str(document.messages[0].get("content") or "")[:QUOTED_CHARS]
        try:
            ids, spans = render(self.tokenizer.full(), document, f"the conversation that begins {opening!r}")
        except UserError as error:
            raise FileFault(file, f": {error}") from None
        check_ids(ids, file, self.tokenizer.vocab_size)
        return ids, spans


def clip_spans(spans: np.ndarray, length: int) -> np.ndarray:
    """The parts of half-open ``spans`` [m, 2] below ``length``; empty ones go."""
    clipped = np.minimum(spans, length).astype(np.uint32).reshape(-1, 2)
    return clipped[clipped[:, 0] < clipped[:, 1]]


def _kept(chunk: Chunk, marks: np.ndarray) -> Iterator[_Kept]:
    number = -1
    for number, (file, document) in enumerate(chunk.documents()):
        if number >= len(marks):
            raise UserError(SOURCE_CHANGED)
        if (split := _SPLIT_OF.get(int(marks[number]))) is not None:
            yield _Kept(split, file, document)
    if number + 1 != len(marks):
        raise UserError(SOURCE_CHANGED)


def _batches(kept: Iterator[_Kept]) -> Iterator[list[_Kept]]:
    batch: list[_Kept] = []
    chars = 0
    for one in kept:
        batch.append(one)
        chars += len(one.document) if isinstance(one.document, str) else 0
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
