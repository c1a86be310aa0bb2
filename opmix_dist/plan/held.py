"""What DeepSpeed and Megatron hold on one rank, by formulas that are tested against the engines themselves,
and what a step needs beside it, of a model of the rank's sizes.

Neither builds without its devices or processes, unlike the engines of :mod:`opmix_dist.plan.memory`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.deepspeed_config import deepspeed_settings
from opmix_dist.engines.held import HeldBytes
from opmix_dist.engines.single import DTYPES, SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.live import LiveBytes
from opmix_dist.plan.memory import RankMemory, StepSizes
from opmix_dist.plan.unallocated import mode_of, pretended, samples, unallocated_engine

FLOAT32 = 4
BUCKET, PREFETCH, LIVE, PERSISTENT = 500_000_000, 50_000_000, 1_000_000_000, 100_000
"""DeepSpeed's defaults, in numbers: reduce_bucket_size, stage3_prefetch_bucket_size,
stage3_max_live_parameters, stage3_param_persistence_threshold."""

QUERY_COPIES = 4
"""Tensors of the queries' size that a block of Megatron's keeps beyond those of a Hugging Face block: as
counted in tests/plan/test_ranks.py, of plain torch's layers on a CPU."""


def deepspeed_held(shapes: Sequence[torch.Size], config: EngineConfig, ranks: int) -> HeldBytes:
    """As ``DeepSpeedEngine.held_bytes``; padding aside."""
    zero = deepspeed_settings(config, OptimizerConfig())["zero_optimization"]
    stage, width = zero["stage"], DTYPES[config.param_dtype].itemsize
    whole = sum(shape.numel() for shape in shapes)
    part = sum(-(-shape.numel() // ranks) for shape in shapes) if stage == 3 else -(-whole // ranks)
    parameters = whole * width
    if stage == 3:
        limit = zero.get("stage3_param_persistence_threshold", PERSISTENT)
        small = sum(shape.numel() for shape in shapes if shape.numel() <= limit)
        parameters = (part + small) * width
    gradients = (whole if stage == 1 else part) * FLOAT32
    optimizer = 3 * part * FLOAT32
    offloaded = optimizer if "offload_optimizer" in zero else 0
    offloaded += part * width if "offload_param" in zero else 0
    return HeldBytes(
        parameters=parameters - (part * width if "offload_param" in zero else 0),
        gradients=gradients,
        optimizer=0 if "offload_optimizer" in zero else optimizer,
        offloaded=offloaded,
    )


def deepspeed_buffers(shapes: Sequence[torch.Size], config: EngineConfig) -> int:
    """Bytes that its settings let it take: gradients that wait for their reduction, and of stage 3 gathered
    parameters."""
    zero = deepspeed_settings(config, OptimizerConfig())["zero_optimization"]
    width, whole = DTYPES[config.param_dtype].itemsize, sum(shape.numel() for shape in shapes)
    # stage 3 makes the buffer at once, the others put together what there is
    bucket = zero.get("reduce_bucket_size", BUCKET)
    found = (bucket if zero["stage"] == 3 else min(bucket, whole)) * width
    if zero["stage"] == 3:
        live = zero.get("stage3_max_live_parameters", LIVE)
        live += zero.get("stage3_prefetch_bucket_size", PREFETCH)
        found += min(live, whole) * width
    return int(found)


def megatron_rank_config(hf: PretrainedConfig, config: EngineConfig) -> PretrainedConfig:
    """A model of the sizes that a rank has of its stage, with embedding and head, which are on the first and
    the last one."""
    settings, found = config.megatron, copy.deepcopy(hf)
    tensor, stages = settings.tensor_parallel, settings.pipeline_parallel
    each = tensor * settings.vocab_multiple
    found.head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    found.num_attention_heads //= tensor
    found.num_key_value_heads //= tensor
    found.intermediate_size //= tensor
    found.vocab_size = math.ceil(hf.vocab_size / each) * each // tensor
    found.num_hidden_layers //= stages
    if getattr(found, "layer_types", None):
        found.layer_types = found.layer_types[: found.num_hidden_layers]
    return found


def megatron_parameters(hf: PretrainedConfig, config: EngineConfig) -> int:
    """Of the rank of the stage that has most."""
    mine = ModelSource(megatron_rank_config(hf, config))
    total = sum(shape.numel() for shape in mine.shapes.values())
    if config.megatron.pipeline_parallel == 1:
        return total
    table = mine.hf_config.vocab_size * hf.hidden_size
    blocks = total - table * (1 if hf.tie_word_embeddings else 2) - hf.hidden_size
    return blocks + table + hf.hidden_size  # the last stage: blocks, norm and head


def megatron_held(hf: PretrainedConfig, config: EngineConfig, ranks: int) -> HeldBytes:
    """As ``MegatronEngine.held_bytes``; padding aside."""
    settings, mine = config.megatron, megatron_parameters(hf, config)
    replicas = ranks // (settings.tensor_parallel * settings.pipeline_parallel)
    narrow = config.param_dtype != "float32"
    return HeldBytes(
        parameters=mine * DTYPES[config.param_dtype].itemsize,
        gradients=mine * FLOAT32,
        optimizer=-(-mine // replicas) * FLOAT32 * (3 if narrow else 2),
    )


def activation_bytes(source: ModelSource, config: EngineConfig, sizes: StepSizes) -> tuple[int, int]:
    """Most that a micro-batch has live at once where each gradient goes elsewhere as soon as it is there, and
    what it keeps for its backward pass: of a model whose parameters have the engine's dtype."""
    plain = config.model_copy(update={"name": "single", "param_dtype": "float32"})
    with pretended(1) as world:
        length = sizes.sequence_length
        engine = unallocated_engine(source, world, plain, sequence_length=length, sharded=False)
        with mode_of(engine.model):
            for parameter in nn.Module.parameters(engine.model):
                parameter.data = parameter.data.to(DTYPES[config.param_dtype])
                parameter.register_post_accumulate_grad_hook(_drop)
            return _passes(engine, samples(sizes.micro_batch_size, length))


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _passes(engine: SingleEngine, batch: TokenBatch) -> tuple[int, int]:
    with LiveBytes() as live:
        losses = engine._losses(batch)
        kept = live.now
        losses.sum().backward()
    return live.peak, kept


def deepspeed_memory(source: ModelSource, config: EngineConfig, sizes: StepSizes) -> RankMemory:
    shapes = list(source.shapes.values())
    held = deepspeed_held(shapes, config, sizes.ranks)
    peak, kept = activation_bytes(source, config, sizes)
    return _together(held, peak + deepspeed_buffers(shapes, config), kept)


def megatron_memory(source: ModelSource, config: EngineConfig, sizes: StepSizes) -> RankMemory:
    """Held by the stage that has most; activations of the first stage, which keeps those of a micro-batch for
    each stage before its first backward pass (1F1B), or of the last one with the logits. What
    ``sequence_parallel`` divides, norms and the residual stream, counts whole."""
    from opmix_dist.engines.megatron.support import FAMILIES  # needs the package

    settings, hf = config.megatron, source.hf_config
    if hf.model_type not in FAMILIES:
        raise UserError(f"engine.name megatron does not train {hf.model_type}: set it to fsdp")
    mine = megatron_rank_config(hf, config)
    whole = config.model_copy(update={"logits_memory": None})

    def passes(vocabulary: int) -> tuple[int, int]:
        part = copy.deepcopy(mine)
        part.vocab_size = vocabulary
        return activation_bytes(ModelSource(part, attention=source.attention), whole, sizes)

    each = QUERY_COPIES * mine.num_attention_heads * mine.head_dim * DTYPES[config.param_dtype].itemsize
    blocks = 1 if config.activation_checkpointing == "full" else mine.num_hidden_layers
    more = each * blocks * sizes.micro_batch_size * sizes.sequence_length
    peak, kept = passes(mine.vocab_size)
    waiting = min(settings.pipeline_parallel, sizes.micro_batches) - 1
    if waiting:
        first, kept = passes(1)
        peak = max(peak, first + waiting * (kept + more))
    return _together(megatron_held(hf, config, sizes.ranks), peak + more, kept)


def _together(held: HeldBytes, peak: int, kept: int) -> RankMemory:
    return RankMemory(
        parameters=held.parameters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations_and_others=peak,
        kept=kept,
        offloaded=held.offloaded,
    )
