"""What Megatron-core can do of what the configuration and the model ask for; the rest is refused by name."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from opmix_dist.config import EngineConfig, RunConfig
from opmix_dist.distributed import World
from opmix_dist.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NO_DOCUMENT_MASK = (
    "data.mask_documents is not for engine.megatron.layers transformer_engine: set that to local"
)
_STATIC_ROPE = ("default", "linear", "llama3")
"""Kinds of rotary embeddings that are a table of frequencies and nothing else."""


def require_settings(config: RunConfig, ranks: int) -> None:
    """What the configuration and the number of trainer ranks tell alone.

    Raises:
        UserError: naming the setting.
    """
    engine, settings = config.engine, config.engine.megatron
    if ranks % engine.ranks_per_replica:
        raise UserError(
            f"engine.megatron.tensor_parallel {settings.tensor_parallel} x "
            f"engine.megatron.pipeline_parallel {settings.pipeline_parallel} does not divide {ranks} "
            "trainer rank(s): change one of them"
        )
    for key in ("compile", "float8"):
        if getattr(engine, key):
            raise UserError(f"engine.{key} is not for engine.name megatron: set it to false")
    if config.data.mask_documents and settings.layers == "transformer_engine":
        raise UserError(NO_DOCUMENT_MASK)


def require_supported(
    model: PreTrainedModel, config: EngineConfig, world: World, sequence_length: int
) -> None:
    """What the model and the machine tell.

    Args:
        model: parameters may be on the meta device.

    Raises:
        UserError: naming the setting or the model's field.
    """
    _require_place(config, world, sequence_length)
    hf = model.config
    if hf.model_type not in FAMILIES:
        raise UserError(
            f"engine.name megatron knows {', '.join(FAMILIES)}, not {hf.model_type}: set it to fsdp"
        )
    _require_blocks(hf, sequence_length)
    _require_rotary(model)
    _require_divisible(hf, config)


def _require_place(config: EngineConfig, world: World, sequence_length: int) -> None:
    settings = config.megatron
    if settings.sequence_parallel and sequence_length % settings.tensor_parallel:
        raise UserError(
            f"engine.megatron.sequence_parallel divides samples of {sequence_length} tokens over "
            f"engine.megatron.tensor_parallel {settings.tensor_parallel} ranks: choose a divisor"
        )
    if world.device.type == "cpu" and torch.cuda.is_available():
        raise UserError("engine.name megatron uses GPUs where there are any: set engine.device to auto")
    if settings.layers == "transformer_engine" and not uses_transformer_engine(config, world):
        raise UserError(
            "engine.megatron.layers transformer_engine needs a GPU and the package transformer_engine: set "
            "it to local"
        )


def uses_transformer_engine(config: EngineConfig, world: World) -> bool:
    if config.megatron.layers == "local" or world.device.type == "cpu":
        return False
    return importlib.util.find_spec("transformer_engine") is not None


def _require_blocks(hf: PretrainedConfig, sequence_length: int) -> None:
    refused = {
        "attention_bias": hf.model_type != "qwen2" and getattr(hf, "attention_bias", False),
        "mlp_bias": getattr(hf, "mlp_bias", False),
        "attention_dropout": hf.attention_dropout > 0,
        "hidden_act": hf.hidden_act != "silu",
        "sliding_window": (getattr(hf, "sliding_window", None) or sequence_length) < sequence_length,
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"engine.name megatron cannot train a model with {field} {getattr(hf, field)}: set it to fsdp"
            )


def _require_rotary(model: PreTrainedModel) -> None:
    rotary = rotary_embedding(model)
    head_size = getattr(model.config, "head_dim", None)
    head_size = head_size or model.config.hidden_size // model.config.num_attention_heads
    if rotary.rope_type not in _STATIC_ROPE or rotary.attention_scaling != 1.0:
        raise UserError(
            f"engine.name megatron cannot train a model with rope_scaling {rotary.rope_type} "
            f"({', '.join(_STATIC_ROPE)} can be): set it to fsdp"
        )
    if 2 * len(rotary.get_buffer("inv_freq")) != head_size:
        raise UserError(
            "engine.name megatron cannot train a model with partial_rotary_factor: set it to fsdp"
        )


def rotary_embedding(model: PreTrainedModel) -> nn.Module:
    """Has ``inv_freq`` [K/2] for heads of size K, in radians per token."""
    return model.get_submodule("model.rotary_emb")


def _require_divisible(hf: PretrainedConfig, config: EngineConfig) -> None:
    tensor = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    parts = [(field, "tensor_parallel") for field in tensor] + [("num_hidden_layers", "pipeline_parallel")]
    for field, setting in parts:
        ranks = getattr(config.megatron, setting)
        if getattr(hf, field) % ranks:
            raise UserError(
                f"engine.megatron.{setting} {ranks} does not divide the model's {field} "
                f"{getattr(hf, field)}: set it to a divisor"
            )
