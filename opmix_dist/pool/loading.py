"""The model that is searched from, whole on a rank or sharded over a team of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.engines.fsdp import fill
from opmix_dist.engines.single import materialise
from opmix_dist.exchange import files
from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.models.build import snapshot_source, transformer_blocks
from opmix_dist.models.long_context import require_attention, require_positions
from opmix_dist.models.lora import require_adaptable
from opmix_dist.models.sharding import shard_blocks
from opmix_dist.models.source import ModelSource, open_source


def searched_source(
    folder: Path, request: SearchRequest, config: SharedConfig, catalogue: Catalogue, device: torch.device
) -> ModelSource:
    """The model that ``request`` searches from.

    Args:
        folder: of the run, which holds its snapshots.

    Raises:
        UserError: the snapshot is not whole, or a checkpoint does not fit probes, samples or the device.
    """
    settings = config.model
    if not request.is_checkpoint:
        files.require_complete(folder / request.snapshot, "snapshot")
        return snapshot_source(
            folder / request.snapshot,
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
    source = open_source(settings, vocab_size=catalogue.vocab_size, token_ids={}, seed=config.seed)
    require_positions(source.hf_config, catalogue.sequence_length, fresh=False)
    require_attention(settings.attention, source.hf_config, device)
    require_adaptable(source.build())
    return source


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
