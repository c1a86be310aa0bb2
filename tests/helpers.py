"""Small real things that several tests need."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_llama(seed: int = 0, *, vocab_size: int = 64, tied: bool = False) -> PreTrainedModel:
    """Two blocks of width 32; grouped-query attention; float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def random_tokens(seed: int, *shape: int, vocab_size: int = 64) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
