"""Whether a model, as it is set up, can take samples of the data's length: positions, attention, memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opmix_dist.errors import UserError
from opmix_dist.models.attention import PLAIN_ARCHITECTURES
from opmix_dist.models.varlen import VARLEN

log = logging.getLogger(__name__)

CONTEXT_FIELDS = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
)
"""What ``model.context`` may replace: no parameter's shape depends on them, where positions are rotary."""
_LARGE_MASK_BYTES = 256 << 20


def with_context(config: PretrainedConfig, context: dict[str, Any]) -> PretrainedConfig:
    """A configuration with the fields of ``model.context`` in place of its own.

    Raises:
        UserError: no such field, or a value that transformers refuses.
    """
    text = config.get_text_config()
    unknown = sorted(set(context) - {name for name in CONTEXT_FIELDS if hasattr(text, name)})
    if unknown:
        known = ", ".join(name for name in CONTEXT_FIELDS if hasattr(text, name)) or "none"
        raise UserError(f"model.context.{unknown[0]} is no such field of a {text.model_type} model: {known}")
    if text is not config:
        raise UserError(
            f"model.context is for text models; change config.json of the {config.model_type} model"
        )
    _require_rope_type(context)
    try:
        return type(config).from_dict({**config.to_dict(), **context})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.context: {' '.join(str(error).split())[:300]}") from None


def _require_rope_type(context: dict[str, Any]) -> None:
    """Transformers would fail with a KeyError, later."""
    for field in ("rope_scaling", "rope_parameters"):
        scaling = context.get(field) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if kind not in known:
            raise UserError(f"model.context.{field}.rope_type {kind} is none of {', '.join(known)}")


def require_positions(config: PretrainedConfig, sequence_length: int, *, fresh: bool) -> None:
    """Rotary positions beyond those that a model knows give numbers, and no good ones; learnt ones have no
    row.

    Args:
        fresh: the model is of ``model.config``, not of a checkpoint.

    Raises:
        UserError: samples are longer than the model's positions.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if known is None or sequence_length <= max(known, _scaled_positions(text)):
        return
    field = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if fresh:
        cure = f"set model.config.{field} to {sequence_length} or more"
    elif _is_rotary(text):
        cure = (
            f"set model.context.max_position_embeddings to {sequence_length} or more, with rope_theta or "
            "rope_scaling that go with it"
        )
    else:
        cure = "its positions are learnt: take another checkpoint"
    raise UserError(
        f"the data's samples have {sequence_length} tokens, and the {text.model_type} model knows {field} "
        f"{known}: {cure}, or prepare the data with a shorter --sequence-length"
    )


def _is_rotary(text: PretrainedConfig) -> bool:
    return any(getattr(text, name, None) is not None for name in ("rope_theta", "rope_parameters"))


def _scaled_positions(text: PretrainedConfig) -> float:
    """Where scaling is not counted in ``max_position_embeddings``, as in Qwen's files: factor x original."""
    scaling = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    original = scaling.get("original_max_position_embeddings") or 0
    return float(scaling.get("factor") or 1.0) * original


def require_attention(attention: str, config: PretrainedConfig, device: torch.device) -> None:
    """
    Raises:
        UserError: ``model.attention`` does not train this model there.
    """
    if attention == "flex_attention" and device.type == "cpu":
        raise UserError(
            "model.attention flex_attention trains on GPUs only, since torch has no backward pass of it on "
            f"CPUs: set it to {VARLEN} or sdpa"
        )
    if attention != VARLEN:
        return
    if config.model_type not in PLAIN_ARCHITECTURES:
        raise UserError(
            f"model.attention {VARLEN} is for {', '.join(PLAIN_ARCHITECTURES)}, not {config.model_type}: set "
            "it to sdpa, or flex_attention on a GPU"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(
            f"model.attention {VARLEN} has no dropout, and the model attention_dropout "
            f"{config.attention_dropout}: set that to 0, or model.attention to sdpa"
        )


def tell_masks(
    attention: str, config: PretrainedConfig, *, samples: int, sequence_length: int, documents: bool
) -> None:
    """Warn where attention holds a tensor of T x T that is large.

    Args:
        samples: of a micro-batch, B.
        documents: ``data.mask_documents``.
    """
    square = samples * sequence_length**2
    if attention == "eager":
        size, what = 4 * square * config.get_text_config().num_attention_heads, "scores"
    elif attention == "sdpa" and documents:
        size, what = 5 * square, "a mask of documents, as booleans and as numbers"
    else:
        return
    if size > _LARGE_MASK_BYTES:
        log.warning(
            "model.attention %s holds %s of %d x %d tokens in each block: %.1f GiB for a micro-batch. %s and "
            "flash_attention_2 need none of it, flex_attention on a GPU neither",
            attention, what, sequence_length, sequence_length, size / 2**30, VARLEN,
        )  # fmt: skip
