"""Tiny models of every architecture that the table of families knows, with adapters that matter."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.lora import JointAdapters

VOCABULARY = 64
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_NEOX = {name: size for name, size in _LLAMA.items() if name != "num_key_value_heads"}
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 3, "head_dim": 8},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "olmo2": _LLAMA,
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5},
}
NAMES = ("old", "a", "b")
RANK, ALPHA = 3, 6
U = np.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [-0.3, 0.8, 0.5]])


def build(
    model_type: str, *, attention: str = "sdpa", embedding: float = 0.2, spread: float = 0.2, **fields: object
) -> PreTrainedModel:
    """Float32, with weights, biases and norms that are all at random.

    Args:
        embedding, spread: standard deviations of the embeddings, and of all other matrices.
        fields: of the config.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, **ARCHITECTURES.get(model_type, {}), **fields}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(0, 1, generator=generator)
        parameter.data = spread * noise if parameter.dim() == 2 else parameter.data + 0.1 * noise
    model.get_input_embeddings().weight.data *= embedding / spread
    return model


def adapt(model: PreTrainedModel, *, size: float = 0.1, dropout: float = 0.0) -> JointAdapters:
    """Random adapters whose deltas change the losses clearly."""
    found = JointAdapters(model, NAMES, rank=RANK, alpha=ALPHA, dropout=dropout, seeds=[0, 1, 2])
    generator = torch.Generator().manual_seed(4)
    for layer in found.layers.values():
        layer.B.data.copy_(torch.empty(layer.B.shape).normal_(0, size, generator=generator))
    return found


def written(
    model: PreTrainedModel, adapters: JointAdapters, u: np.ndarray, dtype: torch.dtype
) -> PreTrainedModel:
    """A copy of the plain ``model`` in ``dtype`` with W + s * sum_c u_c B_c A_c written into it, summed in
    float64."""
    merged = copy.deepcopy(model).double()
    for name, layer in adapters.layers.items():
        delta = sum(u[k] * layer.B[k].detach().double() @ layer.A[k].detach().double() for k in range(len(u)))
        merged.get_submodule(name).weight.data += adapters.scale * delta
    return merged.to(dtype)


def plain_losses(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Loss sums [B] float64 from the model's own logits."""
    positions = batch.position_ids
    with torch.no_grad():
        logits = model(input_ids=batch.tokens, position_ids=positions, use_cache=False).logits.double()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return (losses * batch.loss_mask[:, 1:]).sum(dim=1)
