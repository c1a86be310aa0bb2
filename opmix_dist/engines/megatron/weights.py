"""Hugging Face parameters within Megatron's, for Llama, Mistral, Qwen2 and Qwen3.

A parameter of the one is a whole parameter of the other, or some of its rows; nothing is computed, so what
holds for parameters holds for gradients and AdamW's moments too, and every way there and back is exact.

Megatron has the queries, keys and values of a block in one matrix, key-value group by group
([queries of the group, key, value] x head size rows each), and gate and up of the MLP in another, each rank's
one half above the other. Tensor parallelism divides matrices by output (axis 0) or input (axis 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face parameter is.

    name: of Megatron's parameter, with blocks counted from the model's first one and without Transformer
        Engine's merging of norms into the layers behind them.
    axis: that is divided over tensor-parallel ranks; None: each rank has all of it.
    part: which rows of Megatron's parameter.
    """

    name: str
    axis: int | None = None
    part: Literal["all", "query", "key", "value", "gate", "up"] = "all"


_EMBEDDING = Place("embedding.word_embeddings.weight", 0)
_HEAD = Place("output_layer.weight", 0)
_TOP = {
    "model.embed_tokens.weight": _EMBEDDING,
    "model.norm.weight": Place("decoder.final_layernorm.weight"),
    "lm_head.weight": _HEAD,
}
_BLOCK = {
    "input_layernorm.weight": Place("input_layernorm.weight"),
    "self_attn.q_proj.weight": Place("self_attention.linear_qkv.weight", 0, "query"),
    "self_attn.k_proj.weight": Place("self_attention.linear_qkv.weight", 0, "key"),
    "self_attn.v_proj.weight": Place("self_attention.linear_qkv.weight", 0, "value"),
    "self_attn.q_proj.bias": Place("self_attention.linear_qkv.bias", 0, "query"),
    "self_attn.k_proj.bias": Place("self_attention.linear_qkv.bias", 0, "key"),
    "self_attn.v_proj.bias": Place("self_attention.linear_qkv.bias", 0, "value"),
    "self_attn.q_norm.weight": Place("self_attention.q_layernorm.weight"),
    "self_attn.k_norm.weight": Place("self_attention.k_layernorm.weight"),
    "self_attn.o_proj.weight": Place("self_attention.linear_proj.weight", 1),
    "post_attention_layernorm.weight": Place("pre_mlp_layernorm.weight"),
    "mlp.gate_proj.weight": Place("mlp.linear_fc1.weight", 0, "gate"),
    "mlp.up_proj.weight": Place("mlp.linear_fc1.weight", 0, "up"),
    "mlp.down_proj.weight": Place("mlp.linear_fc2.weight", 1),
}
_MERGED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's names of norms that it computes together with the layers behind them."""
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MEGATRON_BLOCK = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def find_places(name: str, *, tied: bool) -> list[Place]:
    """All places of a Hugging Face parameter: tied embeddings have a copy on the last pipeline stage.

    Raises:
        KeyError: the families above have no such parameter.
    """
    block = _HF_BLOCK.fullmatch(name)
    if block is not None:
        place = _BLOCK[block[2]]
        return [Place(f"decoder.layers.{block[1]}.{place.name}", place.axis, place.part)]
    place = _TOP[name]
    return [place, _HEAD] if tied and place is _EMBEDDING else [place]


def named_parameters(model: nn.Module, first_block: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Of one pipeline stage, which begins with ``first_block``, under the names of :class:`Place`."""
    for name, parameter in model.named_parameters():
        block = _MEGATRON_BLOCK.fullmatch(name)
        if block is None:
            yield name, parameter
        else:
            rest = _MERGED_NORMS.get(block[2], block[2])
            yield f"decoder.layers.{first_block + int(block[1])}.{rest}", parameter


class Layout:
    """How one model's parameters are cut for ``ranks`` tensor-parallel ranks, of which this is ``rank``."""

    def __init__(self, config: PretrainedConfig, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self._queries = heads // groups
        self._head_size = getattr(config, "head_dim", None) or config.hidden_size // heads

    def index(self, place: Place, local: Tensor, shape: tuple[int, ...]) -> Index:
        """Which part of a Hugging Face parameter of ``shape`` this rank has. It is shorter than its place,
        or empty, where rows of a vocabulary are padding."""
        if place.axis is None:
            return ()
        size, whole = self.take(place, local).shape[place.axis], shape[place.axis]
        start = min(self.rank * size, whole)
        return (*([slice(None)] * place.axis), slice(start, min(start + size, whole)))

    def take(self, place: Place, local: Tensor) -> Tensor:
        """This rank's part of a Hugging Face parameter out of Megatron's parameter, padding included."""
        found = self._view(place, local)
        return found.flatten(0, 2) if place.part in ("query", "key", "value") else found

    def put(self, place: Place, local: Tensor, part: Tensor) -> None:
        """The reverse of :meth:`take`; padding stays as it is."""
        target = self._view(place, local)
        if part.numel() < target.numel():
            target = target.narrow(cast(int, place.axis), 0, part.shape[cast(int, place.axis)])
        target.copy_(part.reshape(target.shape))

    def _view(self, place: Place, local: Tensor) -> Tensor:
        """The rows of a part: [groups, heads, head size, ...] of attention, [rows, ...] otherwise."""
        if place.part == "all":
            return local
        if place.part in ("gate", "up"):
            return local.unflatten(0, (2, -1))[0 if place.part == "gate" else 1]
        grouped = local.unflatten(0, (-1, self._queries + 2, self._head_size))
        first = {"query": 0, "key": self._queries, "value": self._queries + 1}[place.part]
        return grouped.narrow(1, first, self._queries if place.part == "query" else 1)
