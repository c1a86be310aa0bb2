"""Samples as a model sees them: padded to T, with what counts in the loss and what may be attended to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.samples import Sample


@dataclass(frozen=True)
class TokenBatch:
    """B samples of T tokens. ``loss_mask`` says which tokens are targets: a token that is predicted from the
    ones before it and counts in the loss. The first token of a sample is never one, padding neither.

    A subclass may have more fields: tensors [B, ...], or None.
    """

    tokens: Tensor  # int64 [B, T]
    loss_mask: Tensor  # bool [B, T]
    position_ids: Tensor | None = None  # int64 [B, T]; given: attention is confined to documents

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return self._each(lambda tensor: tensor[rows])

    @property
    def sequence_length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def targets(self) -> Tensor:
        """Number of targets of each sample, int64 [B]; 0 where a sample has none."""
        return self.loss_mask.sum(dim=1)

    def split(self, size: int) -> list[Self]:
        """Parts of ``size`` samples, the last one possibly smaller."""
        return [self[slice(start, start + size)] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """A copy in memory that a GPU can read without the host's help."""
        return self._each(lambda tensor: tensor.pin_memory())

    def repeat(self, times: int) -> Self:
        """All samples, ``times`` over: [times * B, T]."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    @staticmethod
    def cat(batches: Sequence[TokenBatch]) -> TokenBatch:
        """Batches of one T, all with position ids or all without."""
        positions = [batch.position_ids for batch in batches if batch.position_ids is not None]
        if positions and len(positions) < len(batches):
            raise ValueError("some batches have position ids and some have none")
        return TokenBatch(
            torch.cat([batch.tokens for batch in batches]),
            torch.cat([batch.loss_mask for batch in batches]),
            torch.cat(positions) if positions else None,
        )

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> TokenBatch:
        """Whole samples of [B, T] int64 tokens, every one but the first a target."""
        mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        mask[:, 0] = False
        return cls(tokens, mask)

    @classmethod
    def of_rows(cls, rows: Rows, *, mask_documents: bool) -> TokenBatch:
        """What a model gets.

        Args:
            mask_documents: restart positions at document boundaries, so that attention stays within a
                document, and predict no document's first token, which has nothing to be predicted from.
                Padding is a document of its own.
        """
        mask = rows.learnt.copy()
        mask[:, 0] = False
        positions = None
        if mask_documents:
            mask &= ~rows.starts
            begun = np.flatnonzero(rows.starts)  # every row begins one
            lengths = np.diff(begun, append=mask.size)
            places = np.arange(mask.size) - np.repeat(begun, lengths)
            positions = torch.from_numpy(places.reshape(mask.shape))
        return cls(torch.from_numpy(rows.tokens.astype(np.int64)), torch.from_numpy(mask), positions)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Rows:
    """Samples side by side in the form that is small to send between processes."""

    tokens: np.ndarray  # uint16 or uint32 [B, T]; 0 where a sample has ended
    learnt: np.ndarray  # bool [B, T]: counts in the loss, if it can be predicted
    starts: np.ndarray  # bool [B, T]: first token of a document or of its part, or of the padding


def stack(samples: Sequence[Sample], length: int) -> Rows:
    """Samples of at most ``length`` tokens, T, side by side."""
    dtype = np.result_type(*(sample.tokens.dtype for sample in samples))
    tokens = np.zeros((len(samples), length), dtype=dtype)
    learnt = np.zeros((len(samples), length), dtype=bool)
    starts = np.zeros((len(samples), length + 1), dtype=bool)
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        tokens[row, :n] = sample.tokens
        starts[row, sample.ends] = True
        starts[row, n] = True
        for begin, end in [(0, n)] if sample.spans is None else sample.spans.tolist():
            learnt[row, begin:end] = True
    starts[:, 0] = True
    return Rows(tokens, learnt, starts[:, :length])


def collate(samples: Sequence[Sample], length: int, *, mask_documents: bool = False) -> TokenBatch:
    """Samples as a batch of ``length`` tokens, T; see :meth:`TokenBatch.of_rows`."""
    return TokenBatch.of_rows(stack(samples, length), mask_documents=mask_documents)
