"""The model that is searched from, whole on a rank or sharded over a team of them."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opmix_dist.engines.fsdp import fill
from opmix_dist.engines.single import materialise
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.sharding import shard_blocks
from opmix_dist.models.source import ModelSource


def load(source: ModelSource, device: torch.device, mesh: DeviceMesh | None) -> PreTrainedModel:
    """In float32, frozen and in evaluation mode. Does not communicate; passes through a sharded model do.

    Args:
        mesh: of the ranks to shard over, each of which reads its own part of every parameter; None: whole.
    """
    if mesh is None:
        model = source.whole()
        cast(nn.Module, model).to(device)
    else:
        model = source.build()
        shard_blocks(model, transformer_blocks(model), mesh)
        materialise(model, device)
        for name in source.shapes:
            parameter = cast(nn.Module, model).get_parameter(name)
            fill(cast(DTensor, parameter.detach()), partial(source.part, name))
    cast(nn.Module, model).requires_grad_(False).eval()
    return model
