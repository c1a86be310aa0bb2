"""Models from a configuration: mistakes are named."""

from __future__ import annotations

import importlib.util

import pytest

from opmix_dist.config import ModelConfig
from opmix_dist.errors import UserError
from opmix_dist.models.build import build_model


def build(attention: str, model_type: str = "gpt2") -> None:
    config = ModelConfig(attention=attention, config={"model_type": model_type, "n_layer": 1, "n_embd": 24})
    build_model(config, vocab_size=64, token_ids={}, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_attention_that_this_machine_lacks_is_named() -> None:
    with pytest.raises(UserError, match="model.attention flash_attention_2 cannot be used: FlashAttention2"):
        build("flash_attention_2")


@pytest.mark.parametrize("attention", ["flex_attention", "sdap"])
def test_attention_that_the_architecture_lacks_is_named(attention: str) -> None:
    with pytest.raises(UserError, match=f"model.attention {attention} cannot be used: "):
        build(attention)


def test_a_field_that_the_architecture_lacks_is_named() -> None:
    with pytest.raises(UserError, match="model.config.n_embd is no field of a llama model"):
        build("sdpa", model_type="llama")
