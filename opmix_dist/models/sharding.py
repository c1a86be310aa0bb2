"""A frozen model over several ranks: FSDP2's shards, and what else is to know that a weight may be one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard_blocks(model: PreTrainedModel, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Divide the parameters, which may be on the meta device, over the ranks of ``mesh``. Does not
    communicate; every pass does. A block is whole while it computes only."""
    # float32 logits of 16-bit products are a view of rows; nothing here changes a model's output in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def plain_class(module: nn.Module) -> type:
    """The class as it was before FSDP2 made one of its own of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def own_part(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole."""
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


@contextmanager
def changed(weight: Tensor, change: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, ``weight`` is W + change(), rounded once, and exactly W again after.

    Every rank computes the whole of the change and adds its part. That costs as much as some tens of tokens,
    of thousands that are evaluated with it, and gives the same digits as on one rank.
    """
    with torch.no_grad():
        if isinstance(weight, DTensor):
            shard = weight.to_local()
            kept = shard.clone()
            shard.copy_(shard + change()[own_part(weight)])  # in place: FSDP2 gathers from this memory
        else:
            kept = weight.data
            weight.data = (kept + change()).to(kept.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            if isinstance(weight, DTensor):
                weight.to_local().copy_(kept)
            else:
                weight.data = kept
