"""The FLOPs formula against torch's own counter; parameters against published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from opmix_dist.config import EngineConfig
from opmix_dist.engines.blocks import prepare_blocks
from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.flops import count_flops, flop_counts, num_parameters, parameter_counts
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from tests.helpers import random_batch, tiny_llama, uneven_batch
from tests.models.tiny import ARCHITECTURES, build

BATCH, LENGTH = 3, 24
TOKENS = BATCH * LENGTH
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "no shared heads": ("llama", {"num_key_value_heads": 4}),
    "head_dim": ("llama", {"head_dim": 24}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
}


def measured(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def rotary_angles(model: PreTrainedModel) -> int:
    """What the formula leaves out, once per pass: a small product in transformers 4, none in 5."""
    rotary = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    return measured(lambda: rotary(torch.zeros(1), torch.arange(LENGTH)[None]))


def eager(name: str) -> PreTrainedModel:
    """The counter sees plain matrix products."""
    model_type, fields = MODELS[name]
    return build(model_type, attention="eager", **fields)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_counted_as_torch_counts_it(name: str) -> None:
    """Exactly: forward pass, training step, and training step with each kind of recomputation."""
    model = eager(name)
    counts, batch, rest = count_flops(model, LENGTH), random_batch(0, BATCH, LENGTH), rotary_angles(model)
    assert measured(lambda: sample_losses(model, batch)) == counts.forward * TOKENS + rest
    for kind in ("none", "selective", "full"):
        model = eager(name).train()
        prepare_blocks(transformer_blocks(model), EngineConfig(activation_checkpointing=kind))
        step = measured(lambda: sample_losses(model, batch).sum().backward())  # noqa: B023
        assert step == (counts.train() + counts.recomputed(kind)) * TOKENS + rest, kind
    assert counts.recomputed("full") > 0 == counts.recomputed("selective")


def test_document_masks_change_nothing() -> None:
    model = eager("llama")
    packed = uneven_batch(0, BATCH, LENGTH, mask_documents=True)
    assert packed.position_ids is not None
    rotary = measured(lambda: model.model.rotary_emb(torch.zeros(1), packed.position_ids))
    found = measured(lambda: sample_losses(model, packed))
    assert found == count_flops(model, LENGTH).forward * TOKENS + rotary


def test_probe_flops() -> None:
    model = eager("llama")
    counts = count_flops(model, LENGTH, lora_rank=8)
    adapters = JointAdapters(model, ["a", "b", "c"], rank=8, alpha=16, seeds=[0, 1, 2])
    batch = random_batch(0, BATCH, LENGTH)
    with adapters.training():
        whole_step = measured(lambda: sample_losses(model, batch).sum().backward())
    # the first block's input needs no gradient, which the formula gives it: of two blocks, a few per cent
    assert whole_step == pytest.approx(counts.probe() * TOKENS, rel=0.05)
    with adapters.simulating(torch.eye(3)), torch.no_grad():
        simulated = measured(lambda: sample_losses(model, batch))
    assert simulated == counts.lowrank_candidate(3) * TOKENS + rotary_angles(model)


def test_experts_count_as_often_as_tokens_are_sent_to_them() -> None:
    """Two of four: half of their weights, and all of the router's and of attention's."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    attention, router, expert, head = 2 * 32 * 32 + 2 * 32 * 16, 32 * 4, 3 * 32 * 48, 32 * 64
    weights = attention + router + 2 * expert + head
    assert flop_counts(config, LENGTH).forward == 2 * weights + 4 * LENGTH * 32


def test_gpt2_has_its_own_kind_of_linear_layers() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=LENGTH)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    counts = flop_counts(config, LENGTH)
    assert counts.forward == 2 * (2 * 12 * 32 * 32 + 32 * 64) + 4 * LENGTH * 32 * 2
    found = measured(lambda: sample_losses(model, random_batch(0, BATCH, LENGTH)))
    assert found == counts.forward * TOKENS


# As their authors give them: meta-llama/Meta-Llama-3-8B and Mistral-7B-v0.1 (sizes of their safetensors in
# 16 bits), Qwen2-0.5B (same), Pythia-70M (EleutherAI/pythia, table of models, with and without embeddings).
PUBLISHED = {
    "Llama 3 8B": (
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        8_030_261_248,
    ),
    "Mistral 7B": (
        MistralConfig(
            vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        7_241_732_096,
    ),
    "Qwen2 0.5B": (
        Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "Pythia 70M": (
        GPTNeoXConfig(
            vocab_size=50_304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
            num_attention_heads=8,
        ),
        70_426_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    config, total = PUBLISHED[name]
    counts = parameter_counts(config)
    assert counts.total == total
    table = config.vocab_size * config.hidden_size
    assert (counts.embeddings, counts.head) == (table, 0 if config.tie_word_embeddings else table)


def test_parameters_by_kind() -> None:
    found = parameter_counts(PUBLISHED["Pythia 70M"][0])
    assert found.blocks + found.rest == 18_915_328, "as published, without embeddings"
    assert found.rest == 2 * 512
    llama = PUBLISHED["Llama 3 8B"][0]
    # 6 * parameters without embeddings + 12 * L * d * T (PaLM, appendix B)
    per_token = 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 8192
    assert flop_counts(llama, 8192).train() == per_token


def test_parameters_of_a_hand_counted_model() -> None:
    attention, mlp, norms = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48, 2 * 32
    blocks = 2 * (attention + mlp + norms) + 32
    assert num_parameters(tiny_llama()) == blocks + 2 * 64 * 32
    assert num_parameters(tiny_llama(tied=True)) == blocks + 64 * 32
