"""Causal LMs from a Hugging Face config (fresh weights) or folder (with weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opmix_dist.config import ModelConfig
from opmix_dist.data.catalogue import Catalogue, tokenizer_fingerprint
from opmix_dist.errors import UserError


def build_model(
    config: ModelConfig, *, vocab_size: int, token_ids: dict[str, int | None], seed: int
) -> PreTrainedModel:
    """The model to train, in float32 on the CPU; equal on every rank for equal arguments.

    Args:
        vocab_size: of the data's tokenizer; a fresh model gets it, a checkpoint must have at least it.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` for the exported config.
        seed: of the fresh weights; the global torch generator is left as it was.

    Raises:
        UserError: unknown model_type or field, unreadable checkpoint, vocabulary too small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            _fresh(config, vocab_size, token_ids)
            if config.config is not None
            else load_hf(
                str(config.checkpoint),
                attention=config.attention,
                trust_remote_code=config.trust_remote_code,
            )
        )
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if rows < vocab_size:
        raise UserError(
            f"model.checkpoint {config.checkpoint} has {rows} embeddings but the data's tokenizer "
            f"{vocab_size} tokens; prepare the data with this model's tokenizer"
        )
    return model


def check_tokenizer(config: ModelConfig, catalogue: Catalogue) -> None:
    """A checkpoint folder that brings a tokenizer must bring the one that made the shards.

    Raises:
        UserError: it is another one; training would run, on token ids that mean something else.
    """
    folder = Path(config.checkpoint or "")
    if not config.checkpoint or not (folder / "tokenizer.json").is_file():
        return
    if tokenizer_fingerprint(folder) != catalogue.tokenizer_fingerprint:
        raise UserError(
            f"model.checkpoint {folder} has another tokenizer than the shards in {catalogue.root}: "
            f"prepare the data with `--tokenizer {folder}`"
        )


def _fresh(config: ModelConfig, vocab_size: int, token_ids: dict[str, int | None]) -> PreTrainedModel:
    assert config.config is not None
    fields: dict[str, Any] = {"vocab_size": vocab_size, **token_ids, **config.config}
    try:
        hf = AutoConfig.for_model(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())[:300]}") from None
    # the instance takes any keyword for a field; its class's defaults tell which ones are
    unknown = sorted(set(config.config) - set(type(hf)().to_dict()))
    if unknown:
        raise UserError(f"model.config.{unknown[0]} is no field of a {hf.model_type} model")
    try:
        return AutoModelForCausalLM.from_config(hf, attn_implementation=config.attention, dtype=torch.float32)
    except (ValueError, ImportError) as error:  # an attention that this model, or this machine, does not have
        raise UserError(_attention_fault(config.attention, error)) from None


def _attention_fault(attention: str, error: Exception) -> str:
    return f"model.attention {attention} cannot be used: {' '.join(str(error).split())[:300]}"


def load_hf(
    path: str, *, attention: str = "sdpa", trust_remote_code: bool = False, local_only: bool = False
) -> PreTrainedModel:
    """A causal LM with its weights in float32, from safetensors only (no pickled weights).

    Raises:
        UserError: naming the folder or hub id that could not be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            local_files_only=local_only,
            use_safetensors=True,
        )
    except ImportError as error:
        raise UserError(_attention_fault(attention, error)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {path}: {' '.join(str(error).split())[:300]}") from None


def load_snapshot(folder: Path, *, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    return load_hf(str(folder), attention=attention, trust_remote_code=trust_remote_code, local_only=True)


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, in order: what FSDP wraps, compiles and recomputes one by one.

    Hugging Face names their classes in ``_no_split_modules``.
    """
    names = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        raise UserError(f"{type(model).__name__} does not name its blocks (_no_split_modules)")
    return blocks
