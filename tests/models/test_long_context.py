"""Samples that are longer than a model's positions, and attention that does not train: named beforehand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BloomConfig, PretrainedConfig

from opmix_dist.config import check_config
from opmix_dist.engines.build import build_engine
from opmix_dist.errors import UserError
from opmix_dist.models.long_context import require_attention, require_positions, tell_masks, with_context
from opmix_dist.models.source import ModelSource, checkpoint_source
from tests.engines.test_settings import world
from tests.helpers import tiny_llama, tiny_llama_config
from tests.train.jobs import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def model(model_type: str = "llama", **fields: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize(
    ("config", "fresh", "message"),
    [
        (model(max_position_embeddings=64), True, "set model.config.max_position_embeddings to 65 or"),
        (model(max_position_embeddings=64), False, "set model.context.max_position_embeddings to 65 or"),
        (model("gpt2", n_positions=64), True, "knows n_positions 64: set model.config.n_positions to 65"),
        (model("gpt2", n_positions=64), False, "its positions are learnt: take another checkpoint, or"),
        (
            model(max_position_embeddings=32, rope_scaling={
                "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
            }),
            False,
            "model knows max_position_embeddings 32: ",
        ),
    ],
)  # fmt: skip
def test_samples_beyond_the_positions_are_refused(config: Any, fresh: bool, message: str) -> None:
    require_positions(config, 64, fresh=fresh)
    with pytest.raises(UserError, match=f"the data's samples have 65 tokens, and the .*{message}"):
        require_positions(config, 65, fresh=fresh)


def test_models_without_positions_take_any_length() -> None:
    require_positions(BloomConfig(), 10**6, fresh=True)


def test_a_run_is_refused_before_anything_is_built() -> None:
    source = ModelSource(tiny_llama_config())
    config = check_config(tiny_config(Path("data"), Path("run")))
    with pytest.raises(UserError, match=r"samples have 65 tokens.* set model.config.max_position_embeddings"):
        build_engine(config, source, world(), 65)
    config = check_config(tiny_config(Path("data"), Path("run"), model={"attention": "flex_attention"}))
    with pytest.raises(UserError, match="model.attention flex_attention trains on GPUs only"):
        build_engine(config, source, world(), 64)


def test_a_checkpoint_can_be_given_another_context(tmp_path: Path) -> None:
    """Its positions turn more slowly, its weights are what they were, and what is written says so."""
    tiny_llama().save_pretrained(tmp_path)
    context = {"max_position_embeddings": 4096, "rope_theta": 500_000.0}
    plain = checkpoint_source(str(tmp_path))
    found = checkpoint_source(str(tmp_path), context=context)
    require_positions(found.hf_config, 4096, fresh=False)
    assert plain.hf_config.max_position_embeddings == 64
    before, after = plain.whole(), found.whole()
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    slowest = [m.model.rotary_emb.inv_freq[-1].item() for m in (before, after)]
    assert slowest == pytest.approx([10_000 ** (-6 / 8), 500_000 ** (-6 / 8)])
    found.save_config(tmp_path, torch.float32)
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"hidden_size": 64}, "model.context.hidden_size is no such field of a llama model: max_position_"),
        ({"rope_scaling": {"rope_type": "nonsense"}}, "rope_scaling.rope_type nonsense is none of default, "),
        ({"rope_scaling": {"rope_type": "linear"}}, "model.context: .*factor"),
    ],
)
def test_a_context_that_cannot_be_is_named(context: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_context(tiny_llama_config(), context)


def test_a_context_belongs_to_a_checkpoint() -> None:
    with pytest.raises(UserError, match="model.context is for a model.checkpoint: put its fields into"):
        check_config(tiny_config(Path("d"), Path("r"), model={"context": {"rope_theta": 1e6}}))


def test_attention_that_does_not_train_here_is_named() -> None:
    for attention in ("sdpa", "eager", "varlen"):
        require_attention(attention, model(), CPU)
    require_attention("flex_attention", model(), GPU)
    with pytest.raises(UserError, match="varlen is for llama, .*, not gpt2: set it to sdpa"):
        require_attention("varlen", model("gpt2"), CPU)
    with pytest.raises(UserError, match=r"varlen has no dropout, and the model attention_dropout 0.1"):
        require_attention("varlen", model(attention_dropout=0.1), CPU)
    require_attention("varlen", model(), GPU)


@pytest.mark.parametrize(
    ("attention", "documents", "gigabytes"),
    [("sdpa", True, "10.0"), ("eager", False, "256.0"), ("sdpa", False, ""), ("varlen", True, "")],
)
def test_squares_are_told_of(
    attention: str, documents: bool, gigabytes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """2 x 2^30 pairs of tokens: 5 bytes of a mask, or 4 bytes for each of 32 heads."""
    for length in (1024, 32768):
        tell_masks(attention, model(), samples=2, sequence_length=length, documents=documents)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == bool(gigabytes)
    assert all(f"{gigabytes} GiB" in line and "32768 x 32768" in line for line in told)
