"""Megatron-core's layouts against one process, its parameters against transformers': real ranks over gloo."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from opmix_dist.config import EngineConfig, MegatronConfig, OptimizerConfig, RunConfig, check_config
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.megatron import MegatronEngine
from opmix_dist.engines.megatron.loss import document_mask
from opmix_dist.engines.megatron.support import require_supported, uses_transformer_engine
from opmix_dist.engines.megatron.weights import Layout, Place
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.models.loss import sample_loss_sums
from opmix_dist.models.source import ModelSource
from tests.engines.megatron_ranks import CASES, LLAMA3, MODELS
from tests.engines.ranks import LENGTH, LR, STEPS, heldout, train
from tests.helpers import on_ranks
from tests.train.jobs import tiny_config

RANKS = (4, 2)
EXACT = [(ranks, name) for ranks, cases in CASES.items() for name in cases if name != "bfloat16"]
ONE_RANK = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a launch of four ranks, and then one of two, has found."""
    folder = tmp_path_factory.mktemp("megatron")
    for ranks in RANKS:
        on_ranks(ranks, "tests.engines.megatron_ranks", str(folder))
    return folder


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Curves and held-out losses of one process, by model."""
    found = {}
    for name, config in MODELS.items():
        engine = SingleEngine(
            ModelSource(config, seed=3),
            ONE_RANK,
            config=EngineConfig(name="single"),
            optimizer=OptimizerConfig(lr=LR),
            sequence_length=LENGTH,
        )
        steps = train(engine, 0, STEPS)
        found[name] = {"steps": steps, "evaluation": engine.evaluate(heldout(), batch_size=2).tolist()}
    return found


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


def assert_same_steps(found: list[list[float]], expected: list[list[float]], what: str = "") -> None:
    assert len(found) == len(expected)
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=1e-4), what


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "name"), EXACT)
def test_every_layout_gives_the_curve_of_one_process(
    out: Path, single: dict[str, Any], ranks: int, name: str
) -> None:
    """Losses and gradient norms of packed documents, some samples and micro-batches without a target."""
    found = read(out, f"curves_{ranks}")[name]
    expected = single[found["model"]]
    assert_same_steps(found["steps"], expected["steps"])
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
    settings = CASES[ranks][name][2]
    size = ranks // (settings.get("tensor_parallel", 1) * settings.get("pipeline_parallel", 1))
    assert found["replicas"] == [size, size]  # and one rank of each counts


@pytest.mark.launch
def test_bf16_follows_float32(out: Path, single: dict[str, Any]) -> None:
    found = read(out, "curves_2")["bfloat16"]["steps"]
    for (loss, _), (expected, _) in zip(found, single["llama"]["steps"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
        assert loss != expected


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "name"), EXACT)
def test_parameters_and_moments_go_in_and_out_bit_by_bit_and_give_transformers_logits(
    out: Path, ranks: int, name: str
) -> None:
    found = read(out, f"mapped_{ranks}")[name]
    assert found["differing"] == []
    assert found["shapes"] == found["hf_shapes"]
    assert found["error"] <= 2e-5 * found["scale"]
    assert found["scale"] > 1.0, "logits that say nothing"


@pytest.mark.launch
def test_exports_are_in_parts_of_all_ranks_and_load_with_transformers(out: Path) -> None:
    parts = [load_file(file) for file in sorted((out / "hf").glob("*.safetensors"))]
    assert len(parts) == 4
    model = AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    losses = sample_loss_sums(model, heldout(), 7).tolist()
    assert losses == pytest.approx(read(out, "exported"), rel=1e-5)


@pytest.mark.launch
def test_a_nan_on_one_rank_or_a_spike_stops_all_and_changes_nothing(
    out: Path, single: dict[str, Any]
) -> None:
    for rank in range(2):
        for outcome in read(out, f"raised_{rank}"):
            assert_same_steps(outcome.pop("next"), single["llama"]["steps"][1:2])
            of_losses, of_gradients, of_spike, of_norm, of_fault = outcome.pop("messages")
            assert "have a NaN or inf loss" in of_losses
            assert of_gradients == "the gradient norm is nan"
            assert "above the limit of 1.0000" in of_spike
            assert "the gradient norm is" in of_norm
            assert "above the limit of 1e-06" in of_norm
            assert of_fault == "the gradient norm is nan"
            assert outcome == {"moved": [], "steps": 1}


def test_parts_of_merged_matrices_are_the_rows_of_their_heads() -> None:
    """Two groups of two queries of size 2 on two ranks: rank 1 has the second group."""
    config = Qwen3Config(hidden_size=1, num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    layout = Layout(config, rank=1, ranks=2)
    local = torch.arange(8.0).unsqueeze(1)  # queries 0 to 3, key 4 and 5, value 6 and 7

    def rows(part: Any) -> list[float]:
        return layout.take(Place("qkv", 0, part), local).flatten().tolist()

    assert rows("query") == [0, 1, 2, 3]
    assert rows("key") == [4, 5]
    assert rows("value") == [6, 7]
    assert layout.index(Place("qkv", 0, "query"), local, (8, 1)) == (slice(4, 8),)
    assert layout.take(Place("fc1", 0, "up"), local).flatten().tolist() == [4, 5, 6, 7]
    assert layout.index(Place("fc2", 1), torch.empty(4, 3), (4, 6)) == (slice(None), slice(3, 6))
    layout.put(Place("qkv", 0, "key"), local, torch.tensor([[40.0], [50.0]]))
    assert local.flatten().tolist() == [0, 1, 2, 3, 40, 50, 6, 7]


def test_rows_of_a_padded_vocabulary() -> None:
    """Five tokens in three rows on each of three ranks: rank 1 has two, rank 2 none."""
    embedding = Place("embedding", 0)
    for rank, expected in ((0, slice(0, 3)), (1, slice(3, 5)), (2, slice(5, 5))):
        layout, local = Layout(MODELS["qwen3"], rank, 3), torch.zeros(3, 2)
        (rows,) = layout.index(embedding, local, (5, 2))
        assert rows == expected
        layout.put(embedding, local, torch.ones(5, 2)[rows])
        assert local.sum().item() == 2 * (rows.stop - rows.start)


def test_tokens_look_at_earlier_ones_of_their_document_only() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2]]))
    seen = ~mask[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"engine": {"megatron": {"tensor_parallel": 2, "pipeline_parallel": 2}}},
            "tensor_parallel 2 x engine.megatron.pipeline_parallel 2 does not divide 6 trainer rank",
        ),
        ({"engine": {"compile": True}}, "engine.compile is not for engine.name megatron"),
        ({"engine": {"float8": True}}, "engine.float8 is not for engine.name megatron"),
        (
            {"engine": {"megatron": {"layers": "transformer_engine"}}, "data": {"mask_documents": True}},
            "data.mask_documents is not for engine.megatron.layers transformer_engine",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MegatronEngine.check(run_config(**sections), 6)


def run_config(engine: dict[str, Any], data: dict[str, Any] | None = None) -> RunConfig:
    plain = tiny_config(Path("data"), Path("run"), engine={"name": "megatron", **engine})
    plain["data"] |= data or {}
    return check_config(plain)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
def test_transformer_engine_needs_a_gpu_and_its_package(device: str) -> None:
    """``auto`` takes torch's kernels then."""
    world = World(Placement(Role.TRAINER, 0, 1), torch.device(device))
    config = EngineConfig(megatron=MegatronConfig(layers="transformer_engine"))
    with pytest.raises(UserError, match="transformer_engine needs a GPU and the package transformer_engine"):
        require_supported(ModelSource(MODELS["qwen3"]).build(), config, world, LENGTH)
    assert not uses_transformer_engine(EngineConfig(), world)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, LENGTH, "rope_scaling dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, LENGTH, "rope_scaling yarn"),
        ({"attention_bias": True}, LENGTH, "attention_bias True"),
        ({"hidden_act": "gelu"}, LENGTH, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, LENGTH, "attention_dropout 0.1"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            LENGTH,
            "sliding_window 8",
        ),
        ({"num_key_value_heads": 1}, LENGTH, "tensor_parallel 2 does not divide .* num_key_value_heads 1"),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            LENGTH,
            "pipeline_parallel 2 does not divide .* num_hidden_layers 3: set it",
        ),
        ({}, 15, "sequence_parallel divides samples of 15 tokens"),
    ],
)
def test_models_that_cannot_be_are_named(changes: dict[str, Any], length: int, message: str) -> None:
    config = Qwen3Config(**{**MODELS["qwen3"].to_diff_dict(), **changes})
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True}
    world = World(Placement(Role.TRAINER, 0, 4), torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        require_supported(ModelSource(config).build(), EngineConfig(megatron=layout), world, length)


def test_static_rotary_embeddings_are_accepted_and_other_families_are_not() -> None:
    config = Qwen3Config(**{**MODELS["qwen3"].to_diff_dict(), "rope_scaling": LLAMA3})
    require_supported(ModelSource(config).build(), EngineConfig(), ONE_RANK, LENGTH)
    gpt = ModelSource(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).build()
    with pytest.raises(UserError, match="knows llama, mistral, qwen2, qwen3, not gpt2"):
        require_supported(gpt, EngineConfig(), ONE_RANK, LENGTH)


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    with pytest.raises(UserError, match=r"sequence_parallel needs engine.megatron.tensor_parallel of 2"):
        run_config({"megatron": {"sequence_parallel": True}})
    config = run_config(
        {"megatron": {"sequence_parallel": True, "tensor_parallel": 2, "pipeline_parallel": 3}}
    )
    assert config.engine.ranks_per_replica == 6
