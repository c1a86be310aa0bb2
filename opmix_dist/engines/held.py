"""Bytes that a rank holds for its part of a model, counted from its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class HeldBytes:
    """What one rank holds in the memory of its device, whatever samples it sees.

    parameters: that it computes with, or its shard of them.
    gradients: of these, as AdamW or the reduction over ranks gets them; they may exist during a step only.
    optimizer: AdamW's moments, and float32 parameters where those that are computed with are others.
    offloaded: all of the above that lies in the host's memory instead.
    """

    parameters: int
    gradients: int
    optimizer: int
    offloaded: int = 0


class HeldCounter:
    """Counts the memory behind tensors: of several that lie in one buffer, the buffer, and once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.offloaded = 0
        self._counted: set[int] = set()

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Bytes on the device that were not counted before."""
        found = 0
        for tensor in map(_local, tensors):
            storage = tensor.untyped_storage()
            # by identity, which tensors without memory have too
            if storage.nbytes() and storage._cdata not in self._counted:
                self._counted.add(storage._cdata)
                found += self._place(tensor, storage.nbytes())
        return found

    def count_like(self, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
        """Bytes on the device of others that have the sizes and places of ``tensors``.

        Args:
            dtype: of the others; None: that of ``tensors``.
        """
        mine = list(map(_local, tensors))
        return sum(self._place(t, t.numel() * (dtype or t.dtype).itemsize) for t in mine)

    def _place(self, tensor: Tensor, size: int) -> int:
        if tensor.device.type == self.device.type:
            return size
        self.offloaded += size
        return 0


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
