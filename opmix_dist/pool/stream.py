"""Held-out samples on their way to a device: in an order that has every domain early, one part ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch


def stratified_order(domain_ids: np.ndarray) -> np.ndarray:
    """Order [N] of samples in which any first part has each domain in its proportion, to within a sample.

    Sample i of a domain's n comes at (i + 1/2) / n of the way; domains keep their own order, and ties go by
    domain. Three samples of domain 0 and one of domain 1: 0, 0 and 1 (both half way), 0.
    """
    places = np.empty(len(domain_ids))
    for domain in np.unique(domain_ids):
        rows = np.flatnonzero(domain_ids == domain)
        places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.lexsort((domain_ids, places))


def parts_of(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """``rows`` in parts of ``batch_size``, the last one possibly smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def parts_on(
    device: torch.device, samples: TokenBatch, parts: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, TokenBatch]]:
    """The samples of each part: its rows, and they themselves.

    On a GPU a part is copied while the one before it is computed with: from pinned memory, on a stream of its
    own.
    """
    if device.type != "cuda":
        for part in parts:
            yield part, samples[torch.from_numpy(part)].to(device)
        return
    copying = torch.cuda.Stream(device)
    ahead = _copied(samples, parts[0], device, copying) if parts else None
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert ahead is not None
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        found = ahead
        for tensor in _tensors(found):
            tensor.record_stream(computing)  # its memory is not to be used again before computing is done
        ahead = None if following is None else _copied(samples, following, device, copying)
        yield part, found


def _copied(
    samples: TokenBatch, part: np.ndarray, device: torch.device, stream: torch.cuda.Stream
) -> TokenBatch:
    """Begins the copy and does not wait for it."""
    with torch.cuda.stream(stream):
        return samples[torch.from_numpy(part)].pinned().to(device)


def _tensors(batch: TokenBatch) -> list[Tensor]:
    found = [batch.tokens, batch.loss_mask, batch.position_ids]
    return [tensor for tensor in found if tensor is not None]
