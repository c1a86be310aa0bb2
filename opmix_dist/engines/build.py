"""Choosing an engine by its name in the configuration."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from opmix_dist.config import RunConfig
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.models.documents import require_documents_apart

ENGINES: dict[str, type[SingleEngine]] = {"single": SingleEngine, "fsdp": FSDPEngine}


def build_engine(config: RunConfig, model: PreTrainedModel, world: World, sequence_length: int) -> Engine:
    """Collective over the trainer ranks.

    Raises:
        UserError: ``engine.name: single`` with more than one trainer rank, or ``data.mask_documents`` with a
            model that does not keep documents apart.
    """
    name = config.engine.name
    if name == "auto":
        name = "fsdp" if world.size > 1 else "single"
    if name == "single" and world.size > 1:
        raise UserError(f"engine.name single runs on one trainer rank, not {world.size}: set it to fsdp")
    architecture = type(model).__name__
    engine = ENGINES[name](
        model,
        world,
        config=config.engine,
        optimizer=config.optimizer,
        sequence_length=sequence_length,
    )
    if config.data.mask_documents:
        require_documents_apart(
            lambda batch: engine.evaluate(batch, 1),
            vocab_size=model.config.get_text_config().vocab_size,
            sequence_length=sequence_length,
            architecture=architecture,
            attention=config.model.attention,
        )
        # a block that was compiled for the trial's short samples would be compiled for any shape next
        torch.compiler.reset()
    return engine
