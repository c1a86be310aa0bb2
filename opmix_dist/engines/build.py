"""Choosing an engine by its name in the configuration."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import torch

from opmix_dist.config import EngineConfig, FSDPConfig, OptimizerConfig, RunConfig
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine
from opmix_dist.errors import UserError
from opmix_dist.method_config import LoRAConfig
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.long_context import require_attention, require_positions, tell_masks
from opmix_dist.models.source import ModelSource


class EngineClass(Protocol):
    """What the engines' constructors have in common; collective over the trainer ranks."""

    def __call__(
        self,
        source: ModelSource,
        world: World,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        sequence_length: int,
        lora: LoRAConfig | None = None,
        adapter_seed: int = 0,
    ) -> Engine: ...

    def check(self, config: RunConfig, ranks: int) -> None: ...


# Imported when it is chosen: each may need packages that the others do not.
ENGINES = {
    "single": ("opmix_dist.engines.single", "SingleEngine"),
    "fsdp": ("opmix_dist.engines.fsdp", "FSDPEngine"),
    "deepspeed": ("opmix_dist.engines.deepspeed", "DeepSpeedEngine"),
    "megatron": ("opmix_dist.engines.megatron", "MegatronEngine"),
}


def build_engine(
    config: RunConfig, source: ModelSource, world: World, sequence_length: int, *, adapter_seed: int = 0
) -> Engine:
    """Collective over the trainer ranks.

    Args:
        adapter_seed: of the adapters of ``model.lora``.

    Raises:
        UserError: ``engine.name: single`` with more than one trainer rank, an engine whose package is not
            installed or whose settings contradict others, samples that are longer than the model's
            positions, ``model.attention`` that does not train here, or ``data.mask_documents`` with a model
            that does not keep documents apart.
    """
    name = config.engine.name
    if name == "auto":
        wanted = config.engine.fsdp != FSDPConfig()  # offload, say, has its use on one rank too
        name = "fsdp" if world.size > 1 or wanted else "single"
    if name == "single" and world.size > 1:
        raise UserError(f"engine.name single runs on one trainer rank, not {world.size}: set it to fsdp")
    chosen = engine_class(name)
    chosen.check(config, world.size)
    _require_length(config, source, world, sequence_length, own_attention=name == "megatron")
    # most engines know no adapters, and the configuration has refused them
    adapters: dict[str, Any] = {}
    if config.model.lora is not None:
        adapters = {"lora": config.model.lora, "adapter_seed": adapter_seed}
    engine = chosen(
        source,
        world,
        config=config.engine,
        optimizer=config.optimizer,
        sequence_length=sequence_length,
        **adapters,
    )
    if config.data.mask_documents:
        require_documents_apart(
            lambda batch: engine.evaluate(batch, 1),
            vocab_size=source.hf_config.get_text_config().vocab_size,
            sequence_length=sequence_length,
            architecture=source.architecture,
            attention=config.model.attention,
        )
        # a block that was compiled for the trial's short samples would be compiled for any shape next
        torch.compiler.reset()
    return engine


def _require_length(
    config: RunConfig, source: ModelSource, world: World, sequence_length: int, *, own_attention: bool
) -> None:
    """Whether the model and ``model.attention`` can take samples of so many tokens."""
    hf, attention = source.hf_config, config.model.attention
    require_positions(hf, sequence_length, fresh=source.weights is None)
    if own_attention:
        return
    require_attention(attention, hf, world.device)
    if world.is_leader:
        tell_masks(
            attention,
            hf,
            samples=config.train.micro_batch_size,
            sequence_length=sequence_length,
            documents=config.data.mask_documents,
        )


def engine_class(name: str) -> EngineClass:
    """By its name in the configuration, not ``auto``.

    Raises:
        UserError: its package is not installed.
    """
    module, attribute = ENGINES[name]
    try:
        return cast(EngineClass, getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "opmix_dist":
            raise
        raise UserError(
            f"engine.name {name} needs the package {package}: install it or choose another engine"
        ) from None
