"""Packed documents: each has the losses that it has alone, and a model that mixes them is refused."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from opmix_dist.errors import UserError
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_loss_sums, sample_losses
from tests.helpers import alone_in_rows, documents, one_by_one

LENGTH = 32
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "xglm": {
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled")


def build(model_type: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=64, **SIZES[model_type])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        *[(kind, attention) for kind in ("llama", "mistral", "gpt2") for attention in ("sdpa", "eager")],
        pytest.param("llama", "flex_attention", marks=COMPILED),
    ],
)
def test_a_packed_document_has_the_losses_that_it_has_alone(model_type: str, attention: str) -> None:
    """Mistral's window of 4 tokens is a mask of its own, GPT-2's positions are learnt."""
    model, parts = build(model_type, attention), documents()
    with torch.no_grad():
        packed = sample_losses(model, one_by_one(parts, LENGTH))
        alone = sample_losses(model, alone_in_rows(parts, LENGTH))
        mixed = sample_losses(model, one_by_one(parts, LENGTH, mask_documents=False))
    assert packed[2] == 0, "a single token has no target"
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert (mixed - packed).abs()[[1, 3]].min() > 1e-2, "documents do not meet: this shows nothing"


def test_joint_and_simulated_adapters_take_rows_that_lie_one_behind_the_other() -> None:
    """As flash attention gets them: [1, B * T] instead of [B, T]."""
    adapters = JointAdapters(build("llama"), ["a", "b"], rank=4, alpha=8, seeds=[0, 1])
    for layer in adapters.layers.values():
        layer.B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    batch = one_by_one(documents(), LENGTH)
    assert batch.position_ids is not None
    rows = {"input_ids": batch.tokens, "position_ids": batch.position_ids}
    flat = {name: tensor.view(1, -1) for name, tensor in rows.items()}
    for mode in (adapters.training(), adapters.simulating(torch.tensor([[0.2, 0.8], [1.0, -0.5]]))):
        with mode, torch.no_grad():
            expected = adapters.model(**rows, use_cache=False).logits
            found = adapters.model(**flat, use_cache=False).logits
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def variable_length_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **arguments: object
) -> tuple[Tensor, None]:
    """What flash attention's kernel for documents computes: one row [1, H, B * T, K], cut where positions
    restart, each piece causal by itself."""
    positions = arguments["position_ids"]
    assert isinstance(positions, Tensor)
    assert len(query) == 1, "the kernels that know documents take one row"
    assert mask is None
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    pieces = [
        F.scaled_dot_product_attention(
            *(tensor[:, :, begin:end] for tensor in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for begin, end in pairwise([*starts, positions.shape[1]])
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def test_flash_attention_gets_one_row_and_gives_the_same_losses() -> None:
    """Its own kernels need a GPU; in their place one that looks at what it is given."""
    name = "flash_reference"
    AttentionInterface.register(name, variable_length_attention)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    parts = documents()
    expected = sample_losses(build("llama"), one_by_one(parts, LENGTH))
    model = build("llama", name)
    torch.testing.assert_close(sample_losses(model, one_by_one(parts, LENGTH)), expected)
    require_apart(model)


def require_apart(model: torch.nn.Module, length: int = LENGTH) -> None:
    require_documents_apart(
        lambda batch: sample_loss_sums(model, batch, 1),
        vocab_size=64, sequence_length=length, architecture=type(model).__name__, attention="some",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4, 2048])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_models_that_keep_documents_apart_are_let_through(
    model_type: str, length: int, dtype: torch.dtype
) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        require_apart(build(model_type, "sdpa"), length)


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "xglm"])
def test_models_that_cannot_keep_documents_apart_are_refused(model_type: str) -> None:
    """No positions to pass, a state that runs through all tokens, and a mask of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            pytest.raises(
                UserError, match=r"data.mask_documents: \w+ with model.attention some does not keep"
            ),
        ):
            require_apart(build(model_type))


class OneMaskForAll(torch.nn.Module):
    """A model as with transformers before 4.53: positions go to the embeddings, the mask is causal only."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")
        self.config = self.model.config

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: object) -> object:
        everything = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=everything)


def test_a_model_that_looks_at_positions_but_not_for_documents_is_refused() -> None:
    with pytest.raises(UserError, match=r"OneMaskForAll .* \(a document's loss moves by"):
        require_apart(OneMaskForAll())


def test_a_trial_that_shows_nothing_is_no_proof() -> None:
    """Blocks that add nothing: no token's logits depend on another one, masked or not."""
    model = build("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    with pytest.raises(UserError, match="depend on no earlier document even without"):
        require_apart(model)
