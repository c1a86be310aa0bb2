"""What is known of architectures: where 16-bit products need a cast, which layers share an input, the head.

Everything here holds for the classes of transformers 4.57 and 5 that the table names, and is used for those
alone: another class may scale its logits, cap its scores, or feed a norm's output to more than its linear
layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.sharding import plain_class


@dataclass(frozen=True)
class SharedRead:
    """Linear layers of a block that read one and the same tensor.

    Names are relative to the block.
    """

    readers: tuple[str, ...]
    norm: str | None = None
    """The RMSNorm whose output that tensor is, and which feeds nothing else."""


@dataclass(frozen=True)
class Family:
    """One architecture, as its class in transformers computes it."""

    backbone: str
    """The model without its head. Its ``last_hidden_state`` times the head's weight, and nothing else, is the
    logits."""
    shared: tuple[SharedRead, ...]
    rotary: str | None = None
    """Gives cosines and sines in the residual stream's dtype, and rotated queries and keys have theirs; None
    where queries and keys keep their own."""
    last: str | None = None
    """The linear layer of a block whose result is added to the residual stream, and is nothing else's input:
    a block's activations can be had again without it. None where a norm follows."""
    score_norms: tuple[str, ...] = ()
    """Norms of queries and keys, of a block, whose weights would make their results float32."""


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")

_LLAMA = Family(
    backbone="model",
    shared=(SharedRead(_ATTENTION, "input_layernorm"), SharedRead(_MLP, "post_attention_layernorm")),
    rotary="model.rotary_emb",
    last="mlp.down_proj",
)
_QWEN3 = replace(_LLAMA, score_norms=("self_attn.q_norm", "self_attn.k_norm"))
# norms come after attention and MLP, which read the residual stream itself
_OLMO2 = Family(backbone="model", shared=(SharedRead(_ATTENTION), SharedRead(_MLP)))
# a LayerNorm, with a mean and a bias, for each of two linear layers
_GPT_NEOX = Family(backbone="gpt_neox", shared=(), rotary="gpt_neox.rotary_emb", last="mlp.dense_4h_to_h")

FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _QWEN3,
    "Olmo2ForCausalLM": _OLMO2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
}


def family_of(model: PreTrainedModel) -> Family | None:
    """What the table says of exactly this class of transformers; None for all others, also for subclasses
    and for classes of that name from elsewhere."""
    kind = plain_class(model)
    family = FAMILIES.get(kind.__name__)
    known = family is not None and kind.__module__.startswith("transformers.models.")
    return family if known and _has_plain_head(model) else None


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and head.bias is None


def shared_reads(model: PreTrainedModel, family: Family) -> list[tuple[list[nn.Module], nn.Module | None]]:
    """Of every block: layers that read one tensor, and the norm that it comes from."""
    return [
        (
            [block.get_submodule(name) for name in read.readers],
            None if read.norm is None else block.get_submodule(read.norm),
        )
        for block in transformer_blocks(model)
        for read in family.shared
    ]


def cast_points(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """Modules whose results must be brought to the compute dtype, so that attention gets queries, keys and
    values of one dtype."""
    found = [] if family.rotary is None else [model.get_submodule(family.rotary)]
    for block in transformer_blocks(model):
        found += [block.get_submodule(name) for name in family.score_norms]
    return found
