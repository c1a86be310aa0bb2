"""Engines and models whose tensors have sizes and no memory, on ranks that are not there.

The code that runs is that of a real job: torch's FakeTensorMode gives its operations results without
numbers, and torch's ``fake`` backend answers collectives at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend
from transformers import PreTrainedModel

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.blocks import prepare_blocks
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine, materialise
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.sharding import shard_blocks
from opmix_dist.models.source import ModelSource

CPU = torch.device("cpu")
"""Of all tensors: a GPU's cannot be had without one, even without memory."""


def without_memory() -> FakeTensorMode:
    """Tensors that are made inside have no memory, nor has what is made from them anywhere."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def pretended(ranks: int) -> Iterator[World]:
    """This process is the first of so many trainer ranks inside. It must be in no process group."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield World(Placement(Role.TRAINER, 0, ranks), CPU)
    finally:
        dist.destroy_process_group()


class UnallocatedSingle(SingleEngine):
    """Parameters are not filled, as there is nothing to fill."""

    def _place(self, source: ModelSource) -> None:
        with without_memory():
            materialise(self.model, self.world.device)
        prepare_blocks(transformer_blocks(self.model), self.config)


class UnallocatedFSDP(FSDPEngine):
    def _place(self, source: ModelSource) -> None:
        self._shard(source)
        with without_memory():
            materialise(self.model, self.world.device)


def unallocated_engine(
    source: ModelSource, world: World, config: EngineConfig, *, sequence_length: int, sharded: bool
) -> SingleEngine:
    """An engine of the first rank, ready for passes within a :func:`without_memory` of its tensors."""
    kind = UnallocatedFSDP if sharded else UnallocatedSingle
    # what is compiled keeps less than what is not: a plan counts the eager step
    eager = config.model_copy(update={"compile": False, "float8": False})
    optimizer = OptimizerConfig()
    return kind(source, world, config=eager, optimizer=optimizer, sequence_length=sequence_length)


def unallocated_model(source: ModelSource, ranks: int = 1) -> PreTrainedModel:
    """As the pool loads it: frozen float32 parameters, whole or sharded over the ``ranks`` that
    :func:`pretended` made."""
    model = source.build()
    if ranks > 1:
        shard_blocks(model, transformer_blocks(model), init_device_mesh("cpu", (ranks,)))
    with without_memory():
        materialise(model, CPU)
    module = cast(nn.Module, model)
    module.requires_grad_(False).eval()
    return model


def mode_of(model: PreTrainedModel) -> FakeTensorMode:
    """The one that its tensors were made in: those of two cannot be mixed."""
    for parameter in cast(nn.Module, model).parameters():
        local: Any = getattr(parameter, "_local_tensor", parameter)
        return cast(FakeTensorMode, local.fake_mode)
    raise ValueError("a model without parameters")


def samples(count: int, length: int) -> TokenBatch:
    """Whole samples [count, T], each a single document."""
    return TokenBatch.of_tokens(torch.zeros(count, length, dtype=torch.int64))
