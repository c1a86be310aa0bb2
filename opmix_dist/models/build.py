"""Causal LMs from a Hugging Face config (fresh weights) or folder (with weights)."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from opmix_dist.config import ModelConfig
from opmix_dist.data.catalogue import Catalogue, tokenizer_fingerprint
from opmix_dist.errors import UserError
from opmix_dist.models.sharding import plain_class
from opmix_dist.models.source import ModelSource, checkpoint_source, open_source


def build_model(
    config: ModelConfig, *, vocab_size: int, token_ids: dict[str, int | None], seed: int
) -> PreTrainedModel:
    """A whole model in float32 on the CPU; arguments and errors as of
    :func:`~opmix_dist.models.source.open_source`."""
    return open_source(config, vocab_size=vocab_size, token_ids=token_ids, seed=seed).whole()


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


def snapshot_source(folder: Path, *, attention: str, trust_remote_code: bool) -> ModelSource:
    """Of a folder on this machine."""
    return checkpoint_source(
        str(folder), attention=attention, trust_remote_code=trust_remote_code, local_only=True
    )


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, in order: what FSDP wraps, compiles and recomputes one by one.

    Hugging Face names their classes in ``_no_split_modules``.
    """
    names = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if plain_class(m).__name__ in names]
    if not blocks:
        raise UserError(f"{plain_class(model).__name__} does not name its blocks (_no_split_modules)")
    return blocks
