"""One pipeline stage of a Hugging Face model as Megatron's GPTModel, through its public specs."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from opmix_dist.config import EngineConfig
from opmix_dist.engines.megatron.support import rotary_embedding

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RECOMPUTED: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class RMSNorm(nn.RMSNorm):
    """Torch's, whose gain has a gradient on each rank for its tokens only where tokens are divided: Megatron
    sums these over the ranks of parameters with this attribute."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(nn.Module):
    """Attention by torch's fused kernels, causal, or as a mask says."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """
        Args:
            query: [T, B, H, K]; key and value have H or fewer heads.
            attention_mask: [B, 1, T, T] bool, true where a token must not look; None: causal.

        Returns:
            [T, B, H * K].
        """
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return found.permute(2, 0, 1, 3).flatten(2)


def transformer_config(hf: PretrainedConfig, config: EngineConfig, *, on_cpu: bool) -> TransformerConfig:
    settings, dtype = config.megatron, _DTYPES[config.param_dtype]
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=hf.model_type == "qwen3",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.model_type == "qwen2",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        sequence_parallel=settings.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # losses are sums, and the gradient is divided by the targets of the global batch in the end
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=settings.pipeline_parallel > 1,
        # parameters are filled from the model's source
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **_RECOMPUTED[config.activation_checkpointing],
    )


def build_stage(
    model: PreTrainedModel,
    config: TransformerConfig,
    engine: EngineConfig,
    *,
    transformer_engine: bool,
    sequence_length: int,
) -> GPTModel:
    """This rank's part of ``model``, whose parameters may be on the meta device; its own are zeros.

    Megatron's parallel state must be there.
    """
    hf = model.config
    stage = GPTModel(
        config,
        _transformer_engine_blocks(config) if transformer_engine else _local_blocks(config),
        vocab_size=padded_vocabulary(hf.vocab_size, engine),
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
    )
    # Megatron's own scaling of them is that of one Llama 3 model
    frequencies = rotary_embedding(model).get_buffer("inv_freq")
    stage.rotary_pos_emb.inv_freq = frequencies.to(stage.rotary_pos_emb.inv_freq.device, torch.float32)
    for parameter in stage.parameters():
        nn.init.zeros_(parameter)
    return stage


def padded_vocabulary(size: int, config: EngineConfig) -> int:
    """Rows of the embedding: the same number on each tensor-parallel rank."""
    each = config.megatron.tensor_parallel * config.megatron.vocab_multiple
    return math.ceil(size / each) * each


def _local_blocks(config: TransformerConfig) -> TransformerBlockSubmodules:
    block = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    block.submodules.input_layernorm = block.submodules.pre_mlp_layernorm = RMSNorm
    attention = block.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules([block] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _transformer_engine_blocks(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
