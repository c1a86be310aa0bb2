"""Causal attention without a mask tensor, where nothing but causality is asked for.

Without a mask and a cache, transformers looks for packed documents in the position ids, which it makes itself
where it gets none, and then always makes a mask [B, 1, T, T] (``create_causal_mask`` in masking_utils.py,
4.57). With such a tensor torch cannot take its flash attention, which needs no memory of T^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WITHOUT_MASK = "sdpa_without_mask"
"""The same function as ``sdpa``; transformers makes no mask for an attention that it knows no mask for."""
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)

PLAIN_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox")
"""Their attention is causal, over a sliding window at most, and called by its name in the config."""


@contextmanager
def causal_only(module: nn.Module, length: int) -> Iterator[None]:
    """No mask is made inside for ``length`` tokens of one document each, where that changes nothing.

    Blocks that are recomputed in a backward pass outside get the same: the mask, none, is an argument of
    theirs, and both names stand for one function.
    """
    config = cast(PretrainedConfig, module.config)
    before = config._attn_implementation
    if before == "sdpa" and _is_plain(module, config.model_type) and _reaches(config, length):
        config._attn_implementation = WITHOUT_MASK
    try:
        yield
    finally:
        config._attn_implementation = before


def _is_plain(module: nn.Module, model_type: str) -> bool:
    """Whether it is transformers' own class of an architecture that is known; FSDP2 makes classes of its
    own on top."""
    kind = next(k for k in type(module).__mro__ if not issubclass(k, FSDPModule))
    return kind.__module__.startswith("transformers.models.") and model_type in PLAIN_ARCHITECTURES


def _reaches(config: PretrainedConfig, length: int) -> bool:
    """Whether the window, if there is one, is no shorter than what is attended to."""
    window = getattr(config, "sliding_window", None)
    return window is None or window >= length
