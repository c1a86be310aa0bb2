"""Samples with replies in them: what the student reads, and what the teacher reads beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch, collate
from opmix_dist.data.samples import Sample
from opmix_dist.methods.conversations import Text


@dataclass(frozen=True)
class RepliedBatch(TokenBatch):
    """Samples whose conversations are prompts with replies to them, one behind the other.

    distilled: bool [B, T], targets that the teacher corrects; the others have a cross-entropy.
    teacher_tokens, teacher_mask, teacher_positions: [B, T'], the same replies behind the teacher's contexts,
        as tokens, loss_mask and position_ids of a batch of their own; its targets are those of ``distilled``,
        in the same order.
    """

    distilled: Tensor | None = None
    teacher_tokens: Tensor | None = None
    teacher_mask: Tensor | None = None
    teacher_positions: Tensor | None = None

    @classmethod
    def of(cls, student: Packing, teacher: Packing) -> RepliedBatch:
        """As many rows each, of the same replies."""
        own, theirs = student.batch(), teacher.batch()
        return cls(
            own.tokens,
            own.loss_mask,
            own.position_ids,
            distilled=student.replied(own),
            teacher_tokens=theirs.tokens,
            teacher_mask=theirs.loss_mask,
            teacher_positions=theirs.position_ids,
        )

    @property
    def teacher(self) -> TokenBatch:
        assert self.teacher_tokens is not None
        assert self.teacher_mask is not None
        return TokenBatch(self.teacher_tokens, self.teacher_mask, self.teacher_positions)


class Packing:
    """Rows of documents, to a batch whose documents are apart."""

    def __init__(self, skip_tokens: int) -> None:
        self._skip = skip_tokens
        self._rows: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []

    def begin(self) -> None:
        self._rows.append([])

    def add_text(self, text: Text) -> None:
        self._rows[-1].append((text.tokens, text.learnt, np.zeros_like(text.learnt)))

    def add_reply(self, before: Sequence[int], reply: Sequence[int]) -> None:
        learnt = np.zeros(len(before) + len(reply), dtype=bool)
        learnt[len(before) + self._skip :] = True
        self._rows[-1].append((np.array([*before, *reply]), learnt, learnt))

    def batch(self) -> TokenBatch:
        samples = [_sample([(tokens, learnt) for tokens, learnt, _ in row]) for row in self._rows]
        return collate(samples, max(len(sample.tokens) for sample in samples), mask_documents=True)

    def replied(self, batch: TokenBatch) -> Tensor:
        """bool [B, T], which tokens of ``batch`` are replies' targets."""
        marks = torch.zeros_like(batch.loss_mask)
        for row, parts in enumerate(self._rows):
            if parts:
                joined = np.concatenate([replied for _, _, replied in parts])
                marks[row, : len(joined)] = torch.from_numpy(joined)
        return marks


def _sample(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Sample:
    """Documents [n] with their targets; a row without one is a token that is no target."""
    if not parts:
        return Sample(np.zeros(1, np.uint32), np.ones(1, np.uint32), np.empty((0, 2), np.uint32))
    tokens, learnt = (np.concatenate(column) for column in zip(*parts, strict=True))
    ends = np.cumsum([len(part) for part, _ in parts])
    places = np.flatnonzero(learnt)
    return Sample(tokens.astype(np.uint32), ends.astype(np.uint32), np.stack([places, places + 1], axis=1))
