"""``opmix plan`` as a user calls it: published models, changed settings, warnings, mistakes; its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.config import load_config
from opmix_dist.models.flops import count_flops, parameter_counts
from opmix_dist.plan.question import sizes_of_model
from tests.helpers import ROOT
from tests.pages import compare_shown, read_blocks, run_blocks
from tests.plan.test_memory import run_config

QWEN = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SIZES = ("--domains", "3", "--sequence-length", "32")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    found = run_config(model={"config": TINY}, train__global_batch_size=32, data__root="nowhere")
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    return path


def planned(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> dict[str, Any]:
    assert main(["plan", str(config), "--gpu", "h100", *SIZES, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    assert main(["plan", str(config), *arguments]) == 2
    return capsys.readouterr().err


def test_a_published_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2 0.5B has 494,032,768 parameters, 16 bytes each of them in float32 with AdamW."""
    path = tmp_path / "qwen.yaml"
    found = run_config(model={"config": QWEN}, train__global_batch_size=32, mixture__policy="static")
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    plan = planned(capsys, path, "--gpus-per-node", "1", "--engine.name", "single")
    assert plan["parameters"]["total"] == 494_032_768
    memory = plan["memory"]
    assert memory["parameters"] + memory["gradients"] + memory["optimizer"] == 16 * 494_032_768
    assert plan["search"] is None
    # 6 FLOPs for each weight but those of the norms; the tied table multiplies once; 12 L d T for attention
    norms, biases = (2 * 24 + 1) * 896, 24 * (896 + 2 * 128)
    per_token = 6 * (494_032_768 - norms - biases) + 12 * 24 * 896 * 32
    assert plan["flops"]["train"] == per_token
    training = plan["phases"][0]
    assert training["flops"] == 10 * 32 * 32 * per_token
    # float32 products, which torch does not do in tf32 unless it is told to
    assert training["gpu_hours"] == pytest.approx(training["flops"] / (67e12 * 0.4) / 3600)


def test_settings_and_sizes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(
        capsys, config, "--vocab-size", "64", "--pool-ranks", "4", "--engine.param_dtype", "bfloat16"
    )
    assert plan["asked"]["trainers"] == 4
    assert plan["search"]["chosen"]["ranks"] == 4
    assert plan["search"]["components"] == 4
    assert plan["rates"]["peak"] == 989.5e12
    assert len(plan["warnings"]) == 2, "two micro-batches, and a search that is late"
    assert "the search takes" in plan["warnings"][1]
    inline = planned(capsys, config, "--vocab-size", "64")
    assert (inline["asked"]["trainers"], inline["search"]["chosen"]["place"]) == (8, "inline")
    assert inline["search"]["resident"] == inline["memory"]["parameters"] + inline["memory"]["optimizer"]
    for phase in plan["phases"][:2]:
        assert phase["ranks"] == 4


def test_what_does_not_fit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """320,000 tokens of 32 numbers are little, their 300,000 logits each are not."""
    vocabulary = ("--vocab-size", "300000", "--engine.logits_memory", "null", "--mixture.policy", "static")
    length = ("--sequence-length", "80000", "--model.config.max_position_embeddings", "80000")
    (training,) = planned(capsys, config, *vocabulary, *length)["warnings"]
    assert training.startswith("training does not fit: a rank needs ")
    assert "engine.activation_checkpointing full" in training


def test_whole_gradients_between_micro_batches(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, config, "--vocab-size", "64", "--train.global_batch_size", "64")
    assert any("a step has 2 micro-batches" in w and "micro_batch_size 8" in w for w in plan["warnings"])


def test_tables(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (
        "--gpu",
        "h100",
        "--pool-nodes",
        "2",
        "--pool-gpu",
        "a100-40",
        "--engine.param_dtype",
        "bfloat16",
    )
    assert main(["plan", str(config), *kinds, *SIZES, "--vocab-size", "64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("training", "probes", "candidates", "inline", "GPU-hours", "a step takes"):
        assert text in shown
    assert "in the search 0.4 of 312.0 (a100-40)" in shown
    assert "a pool of 16 a100-40" in shown
    assert "a100-40 GPU-hours" in shown
    assert "makes the search finish within 10.0% of the training after its request" in shown


def test_a_pool_on_other_gpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the launch's ranks train; the search is on two machines of A100."""
    pool = ("--pool-nodes", "2", "--pool-gpu", "a100-40", "--engine.param_dtype", "bfloat16")
    plan = planned(capsys, config, "--vocab-size", "64", *pool)
    asked, search = plan["asked"], plan["search"]
    assert (asked["trainers"], asked["pool_ranks"], asked["search_gpu"]) == (8, 16, "a100-40")
    assert (plan["rates"]["peak"], plan["rates"]["pool_peak"]) == (989.5e12, 312e12)
    assert (search["resident"], search["usable"]) == (0, 38_000_000_000)
    training, _, probes, candidates = plan["phases"]
    assert (training["ranks"], training["gpu"]) == (8, "h100")
    for phase in (probes, candidates):
        assert (phase["ranks"], phase["gpu"]) == (16, "a100-40")
    assert search["chosen"]["search"]["probes"] == probes["seconds"]


def test_mistakes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (*SIZES, "--vocab-size", "64")
    assert "choose one of a100" in refused(capsys, config, "--gpu", "h1", *size)
    assert "--vocab-size" in refused(capsys, config, "--gpu", "h100", *SIZES)
    assert "give --domains and --sequence-length" in refused(capsys, config, "--gpu", "h100")
    assert "--mfu 40" in refused(capsys, config, "--gpu", "h100", "--mfu", "40", *size)
    assert "multiple" in refused(capsys, config, "--gpu", "h100", "--nodes", "3", *size)
    assert "leaves no trainer" in refused(capsys, config, "--gpu", "h100", "--pool-ranks", "8", *size)
    pool = ("--gpu", "h100", "--pool-gpu", "a100", *size)
    assert "give --pool-nodes" in refused(capsys, config, *pool)
    assert "--pool-gpu a1 is not" in refused(capsys, config, "--gpu", "h100", "--pool-gpu", "a1", *size)
    assert "give one" in refused(capsys, config, *pool, "--pool-nodes", "1", "--pool-ranks", "8")
    assert "give that too" in refused(capsys, config, *pool, "--pool-gpus-per-node", "4")
    external = ("--gpu", "h100", "--pool.external", "true", *size)
    assert "give its size with --pool-nodes" in refused(capsys, config, *external)
    few = ("--gpu", "a100", "--engine.float8", "true", *size)
    assert "has no float8 products" in refused(capsys, config, *few)


def test_the_arithmetic_of_the_page() -> None:
    """Each number that the page works out, from the configuration that it names."""
    config = load_config(ROOT / "configs" / "llama3_8b.yaml", [])
    source, length, domains, ranks = sizes_of_model(config, None), 4096, 12, 64
    flops = count_flops(source.build(), length, config.search.probes.rank)
    counts, train, search = parameter_counts(source.hf_config), config.train, config.search
    tokens = train.steps * train.global_batch_size * length
    probe_tokens = (domains + 1) * search.probes.steps * search.probes.batch_size * length
    candidates = 4 + search.candidates.count + search.refinement.count * search.refinement.rounds
    held_out = domains * search.candidates.samples_per_domain
    rate, total = 989.5e12 * 0.4, counts.total
    worked_out = [
        f"= {counts.blocks // 32:,}; 32 of them",
        f"make {total:,}.",
        f"{(flops.forward - flops.attention) / 2:,.0f}, and for attention",
        f"{flops.attention:,.0f}: {flops.forward:,.0f} forward",
        f"= {4 * total / ranks / 1e9:.2f} GB of parameters",
        f"4 x 16,384 x 128,256 bytes = {4 * 4 * length * 128_256 / 1e9:.1f} GB",
        f"= {tokens / 1e9:.2f} billion tokens x {flops.train() / 1e9:.2f} GFLOPs = "
        f"{tokens * flops.train():.2e}".replace("e+", "e"),
        f"{tokens * flops.train() / rate / ranks:,.0f} s = 2.5 days",
        f"x 500 steps x 64 samples x 4096 = {probe_tokens / 1e9:.2f} billion tokens",
        f"3 x {flops.lora_per_adapter / 1e9:.3f} (adapter",
        f"= {flops.probe() / 1e9:.2f} GFLOPs",
        f"{2 * (total - counts.embeddings) / 1e9:.1f} GB of bfloat16 copies",
        f"{candidates} x {held_out} samples x 4096 = {candidates * held_out * length / 1e6:.1f} million",
        f"12 bytes x 8.03 billion = {12 * total / 1e9:.1f} GB a checkpoint",
        f"bfloat16 is {2 * total / 1e9:.1f} GB",
    ]
    page = " ".join((ROOT / "docs" / "plan.md").read_text().split())
    for text in worked_out:
        assert text in page


@pytest.mark.launch  # takes a core for half a minute
def test_the_page_shows_what_the_command_prints() -> None:
    blocks = read_blocks((ROOT / "docs" / "plan.md").read_text())
    run_blocks(blocks, ROOT)
    assert compare_shown(blocks) > 40
