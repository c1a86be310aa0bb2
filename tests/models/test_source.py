"""Parameters one at a time: fresh ones by transformers' own rules, stored ones from its own files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    Qwen2Config,
)

from opmix_dist.config import ModelConfig
from opmix_dist.errors import UserError
from opmix_dist.models.source import ModelSource, checkpoint_source, open_source
from tests.helpers import random_tokens, tiny_llama, tiny_llama_config

GPT2 = GPT2Config(n_layer=8, n_embd=128, n_head=2, vocab_size=64, n_positions=32)
QWEN2 = Qwen2Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=3, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip
BLOOM = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=random_tokens(1, 2, 12)).logits


def test_the_token_that_pads_is_trained_as_an_input() -> None:
    """It ends documents too; transformers leaves it at 0."""
    model = ModelSource(QWEN2, seed=5).whole()
    embeddings = model.get_input_embeddings()
    assert embeddings.weight[3].abs().max() > 0
    embeddings(torch.tensor([3, 4])).sum().backward()
    assert torch.equal(embeddings.weight.grad[3:5], torch.ones(2, 32))


@pytest.mark.parametrize("config", [tiny_llama_config(tied=True), QWEN2, GPT2, BLOOM])
def test_fresh_parameters_are_distributed_as_those_of_transformers(config: PretrainedConfig) -> None:
    source = ModelSource(config, attention="eager", seed=5)
    torch.manual_seed(0)
    unpadded = copy.deepcopy(config)
    unpadded.pad_token_id = None
    theirs = dict(cast(nn.Module, AutoModelForCausalLM.from_config(unpadded)).named_parameters())
    assert list(source.shapes) == list(theirs)
    for name, expected in theirs.items():
        found = source.tensor(name)
        assert found.shape == expected.shape
        assert torch.equal(found, source.tensor(name)), "depends on what was asked before"
        assert torch.equal(found == 0, expected == 0), "biases"
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=5e-3)
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.1, abs=1e-6)
    assert len({source.tensor(name).sum().item() for name in theirs if theirs[name].std() > 0}) > 2


def test_gpt2_scales_what_feeds_the_residual_stream() -> None:
    """0.02 / sqrt(2 * 8 blocks) = 0.005, a rule of the block and not of the layer."""
    found = ModelSource(GPT2).tensor("transformer.h.3.mlp.c_proj.weight")
    assert found.std().item() == pytest.approx(0.005, rel=0.02)


def test_a_seed_is_one_model_and_another_seed_another() -> None:
    config = ModelConfig(config={"model_type": "gpt2", "n_layer": 1, "n_embd": 24, "n_head": 2})
    state = torch.get_rng_state()

    def weight(seed: int) -> torch.Tensor:
        source = open_source(config, vocab_size=64, token_ids={}, seed=seed)
        return source.tensor("transformer.h.0.mlp.c_fc.weight")

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"


def test_the_model_without_parameters_has_its_buffers() -> None:
    model = ModelSource(tiny_llama_config()).build()
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("config", [tiny_llama_config(tied=True), tiny_llama_config(), GPT2])
def test_a_checkpoint_in_files_gives_the_model_that_was_saved(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    saved = AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = checkpoint_source(str(tmp_path))
    assert torch.equal(logits(source.whole()), logits(saved))
    name = next(name for name in source.shapes if name.endswith("o_proj.weight") or "c_fc.weight" in name)
    whole = dict(saved.named_parameters())[name]
    index = (slice(1, 7), slice(8, 30))
    assert torch.equal(source.part(name, index), whole[index])
    assert source.part(name, (slice(3, 3), slice(0, 5))).shape == (0, 5)
    assert torch.equal(source.part(name, (slice(2, 5),)), whole[2:5]), (
        "all of what follows, as engines ask for it"
    )


def test_bfloat16_files_and_files_of_a_bare_body(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2)
    model.transformer.to(torch.bfloat16).save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    found = checkpoint_source(str(tmp_path)).tensor("transformer.wte.weight")
    assert found.dtype == torch.float32
    assert torch.equal(found, model.transformer.wte.weight.float())


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    gate = held.pop("model.layers.1.mlp.gate_proj.weight")
    save_file(held, file)
    with pytest.raises(UserError, match="no weights for model.layers.1.mlp.gate_proj.weight"):
        checkpoint_source(str(tmp_path))
    save_file(held | {"model.layers.1.mlp.gate_proj.weight": gate[:5]}, file)
    with pytest.raises(UserError, match=r"gate_proj.weight is \[5, 32\], but its config.json tells of \[48"):
        checkpoint_source(str(tmp_path))
    file.unlink()
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="it has no safetensors files"):
        checkpoint_source(str(tmp_path))
    with pytest.raises(UserError, match="cannot load the model .*nowhere"):
        checkpoint_source(str(tmp_path / "nowhere"), local_only=True)


def test_a_smaller_vocabulary_than_the_data_has_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = ModelConfig(checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="has 64 embeddings but the data's tokenizer 65 tokens"):
        open_source(config, vocab_size=65, token_ids={}, seed=0)


class ScaledConfig(GPT2Config):
    model_type = "gpt2_scaled"


class Scaled(GPT2LMHeadModel):
    """With a parameter of its own, which only the constructor fills."""

    config_class = ScaledConfig

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(3))


def test_an_architecture_that_does_not_say_how_to_initialise_is_refused() -> None:
    """What a constructor alone has filled is lost where the model is built without parameters."""
    AutoModelForCausalLM.register(ScaledConfig, Scaled)
    source = ModelSource(ScaledConfig(n_layer=1, n_embd=24, n_head=2, vocab_size=64))
    assert source.tensor("transformer.h.0.mlp.c_fc.weight").isfinite().all()
    with pytest.raises(UserError, match="Scaled does not say how scale is initialised: start from model.ch"):
        source.tensor("scale")
