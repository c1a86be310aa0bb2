"""Parameter and FLOP counts of a model, also from its Hugging Face configuration alone.

A multiply-add is two FLOPs, as torch's FlopCounterMode counts. What is counted, per token of a sample of T:

- every linear layer, biases aside: 2 * d_in * d_out; of experts, those that a token is sent to;
- attention: 4 * T * H * K for each block of H query heads of size K: scores and weighted values over all T
  positions. Causal, document and window masks do not lower it (the convention since PaLM, arXiv 2204.02311,
  appendix B), and shared key-value heads do not either, as each query head has its own products;
- the backward pass: twice the forward pass, once for the gradient of either factor.

Model FLOPs, which MFU is taken of, end there. Hardware FLOPs, which HFU is taken of, have on top what
activation checkpointing computes again. Neither has what a fused attention kernel computes again inside,
nor norms, activations, rotary embeddings and the optimiser, which are no matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.families import family_of

Recomputed = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs per token of one model at one sequence length."""

    forward: float
    attention: float
    """Scores and weighted values, a part of ``forward``."""
    blocks: float
    """The repeated blocks, attention included, a part of ``forward``: without the head."""
    recomputed_blocks: float
    """What it takes to compute their activations again. A block's last product is not needed for that where
    its result is only added to the residual stream."""
    lora_per_adapter: float
    """Shrink and expand of one adapter on every adapted layer: 2 * r * (d_in + d_out)."""
    merge_per_adapter: float
    """Adding u * s * B A into every adapted weight once: 2 * r * d_in * d_out (not per token)."""

    @property
    def head(self) -> float:
        return self.forward - self.blocks

    def train(self) -> float:
        """Model FLOPs: forward and backward pass, computed once."""
        return 3.0 * self.forward

    def recomputed(self, kind: Recomputed) -> float:
        """What activation checkpointing adds in the backward pass; ``selective`` keeps all products."""
        return self.recomputed_blocks if kind == "full" else 0.0

    def probe(self) -> float:
        """A frozen base needs gradients to activations only, its attention to both factors, which are
        activations; the adapter needs both kinds."""
        return 2.0 * self.forward + self.attention + 3.0 * self.lora_per_adapter

    def lowrank_candidate(self, num_adapters: int) -> float:
        return self.forward + num_adapters * self.lora_per_adapter

    def candidate_gradients(self, num_adapters: int) -> float:
        """A candidate's loss with its gradient to the coefficients: a backward pass to activations costs as
        much as a forward pass, attention's twice that, and the adapters take three of theirs."""
        return 2.0 * self.forward + self.attention + 3.0 * num_adapters * self.lora_per_adapter


@dataclass(frozen=True)
class ParameterCounts:
    """Distinct parameters by kind; tied ones count once, as embeddings."""

    embeddings: int
    """Of tokens, and of positions where the model learns them."""
    blocks: int
    """Of the repeated blocks, norms included."""
    head: int
    """0 where it is tied to the embeddings."""
    rest: int
    """The norm before the head, as a rule."""

    @property
    def total(self) -> int:
        return self.embeddings + self.blocks + self.head + self.rest


def count_flops(model: PreTrainedModel, sequence_length: int, lora_rank: int = 0) -> FlopCounts:
    """Counts for a plain model (no adapters injected), whose parameters may be on the meta device."""
    head = model.get_output_embeddings()
    products = list(_products(model))
    attention = _attention(model.config.get_text_config(), sequence_length)
    in_head = sum(2.0 * p.weights for p in products if p.module is head)
    forward = sum(2.0 * p.weights for p in products) + attention
    adapted = [p for p in products if isinstance(p.module, nn.Linear) and p.module is not head]
    return FlopCounts(
        forward=forward,
        attention=attention,
        blocks=forward - in_head,
        recomputed_blocks=forward - in_head - _last_products(model),
        lora_per_adapter=sum(2.0 * lora_rank * p.share * (p.d_in + p.d_out) for p in adapted),
        merge_per_adapter=sum(2.0 * lora_rank * p.d_in * p.d_out for p in adapted),
    )


def flop_counts(config: PretrainedConfig, sequence_length: int, lora_rank: int = 0) -> FlopCounts:
    """:func:`count_flops` of the model that a configuration describes; nothing is allocated."""
    return count_flops(on_meta(config), sequence_length, lora_rank)


def parameter_counts(config: PretrainedConfig) -> ParameterCounts:
    """Of the model that a configuration describes; nothing is allocated."""
    model = on_meta(config)
    blocks = [p for block in transformer_blocks(model) for p in block.parameters()]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = [p for table in tables for p in table.parameters()]
    head = model.get_output_embeddings()
    counted: set[int] = set()

    def count(parameters: list[nn.Parameter]) -> int:
        fresh = {id(p): p.numel() for p in parameters if id(p) not in counted}
        counted.update(fresh)
        return sum(fresh.values())

    return ParameterCounts(
        embeddings=count(embeddings),
        blocks=count(blocks),
        head=count(list(head.parameters()) if head is not None else []),
        rest=count(list(cast(nn.Module, model).parameters())),
    )


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its parameters or buffers: shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters (tied weights count once)."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class _Product:
    """A matrix that tokens are multiplied with."""

    module: nn.Module
    d_in: int
    d_out: int
    share: float
    """Of all tokens."""

    @property
    def weights(self) -> float:
        return self.share * self.d_in * self.d_out


def _products(model: PreTrainedModel) -> Iterator[_Product]:
    """Of each linear layer, GPT-2's kind included, and of experts that lie in one tensor [E, ., .]."""
    experts = _share_of_experts(model.config.get_text_config())
    for name, module in cast(nn.Module, model).named_modules():
        in_experts = "experts" in name.split(".") and "shared_experts" not in name.split(".")
        share = experts if in_experts else 1.0
        if isinstance(module, nn.Linear):
            yield _Product(module, module.in_features, module.out_features, share)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            yield _Product(module, d_in, d_out, share)
        elif in_experts:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    count, d_in, d_out = parameter.shape
                    yield _Product(module, d_in * count, d_out, share)


def _share_of_experts(config: PretrainedConfig) -> float:
    """Experts that a token is sent to, over their number; 1 of a model without any."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            return float(config.num_experts_per_tok) / count
    return 1.0


def _attention(config: PretrainedConfig, sequence_length: int) -> float:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4.0 * sequence_length * heads * head_size * config.num_hidden_layers


def _last_products(model: PreTrainedModel) -> float:
    """FLOPs of the products that no activation depends on, where the architecture is known; else 0."""
    family = family_of(model)
    if family is None or family.last is None:
        return 0.0
    last = [block.get_submodule(family.last) for block in transformer_blocks(model)]
    return sum(2.0 * cast(nn.Linear, layer).weight.numel() for layer in last)
