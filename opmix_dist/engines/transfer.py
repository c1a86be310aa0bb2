"""Copies between host and GPU that do not make one wait for the other's whole queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch


def send(batches: Sequence[TokenBatch], device: torch.device) -> list[TokenBatch]:
    """Batches on ``device``. From pageable memory a GPU's copy would wait until all that was queued before it
    is done, and the host for the copy."""
    if device.type == "cuda":
        batches = [batch.pinned() for batch in batches]
    return [batch.to(device) for batch in batches]


def read_later(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy ``values`` to the CPU; the returned call waits for them, and not for what was queued
    after them."""
    if values.device.type != "cuda":
        return lambda: values
    copied = values.to("cpu", non_blocking=True)  # to pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> Tensor:
        arrived.synchronize()
        return copied

    return read
