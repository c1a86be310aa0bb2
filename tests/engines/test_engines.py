"""FSDP2 in all its layouts against one process, exact resumes, exports: real ranks over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opmix_dist.exchange import files
from opmix_dist.models.loss import sample_loss_sums
from opmix_dist.models.source import checkpoint_source
from tests.engines.ranks import CASES, LR, MODELS, STEPS, fresh, global_batch, heldout
from tests.helpers import on_ranks

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What launches of 1, 2, 3 and 4 ranks have found."""
    folder = tmp_path_factory.mktemp("engines")
    for ranks in (1, 2, 3, 4):
        on_ranks(ranks, "tests.engines.ranks", str(folder))
    return folder


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def single(out: Path) -> dict[str, Any]:
    """The curve of one process, by model."""
    curves = read(out, "curves_1")
    return {name: curves[f"single, {name}"] for name in MODELS}


def test_one_process_equals_a_loop_written_by_hand(single: dict[str, Any]) -> None:
    """The engine's micro-batches, scaling and clipping against the textbook loop on the whole batch."""
    model = fresh("llama").whole()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(STEPS):
        batch = global_batch(step)
        labels = batch.tokens.masked_fill(~batch.loss_mask, -100)
        arguments = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "use_cache": False}
        loss = model(**arguments, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert single["llama"]["steps"][step] == pytest.approx([loss.item(), norm.item()], rel=5e-5)
    assert single["llama"]["steps"][0][1] > 1.0, "nothing is clipped"


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(n, name) for n, cases in CASES.items() for name in cases if not name.startswith(("single", "bf"))],
)
def test_every_layout_gives_the_same_curve(out: Path, single: dict[str, Any], ranks: int, name: str) -> None:
    found = read(out, f"curves_{ranks}")[name]
    expected = single[found["model"]]
    assert len(found["steps"]) == STEPS
    torch.testing.assert_close(
        torch.tensor(found["steps"]), torch.tensor(expected["steps"]), rtol=1e-4, atol=0
    )
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)


def test_bf16_follows_float32(out: Path, single: dict[str, Any]) -> None:
    found = read(out, "curves_2")["bfloat16"]["steps"]
    for (loss, _), (expected, _) in zip(found, single["llama"]["steps"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
        assert loss != expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_exact(out: Path, ranks: int) -> None:
    for rest, again in read(out, f"exact_{ranks}").values():
        assert rest == again, "not bit-identical"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_is_written_in_parts_that_transformers_and_the_engine_load(out: Path, ranks: int) -> None:
    """As it was when the writing began, though it trained on."""
    folder, found = out / f"hf_{ranks}", read(out, f"exported_{ranks}")
    assert found["read"] == pytest.approx(found["losses"], rel=1e-6)
    assert "Not a directory" in found["failure"]
    parts = [load_file(file) for file in sorted((folder / "exact").glob("*.safetensors"))]
    assert len(parts) == ranks
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    assert max(sizes) < 1.5 * min(sizes), "one rank holds most of it"
    model = AutoModelForCausalLM.from_pretrained(folder / "exact").eval()
    assert sample_loss_sums(model, heldout(), 7).tolist() == pytest.approx(found["losses"], rel=1e-6)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert files.require_complete(folder / "exact", "export") == {"step": 2}
    half = load_file(folder / "half" / f"model-00001-of-0000{ranks}.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert checkpoint_source(str(folder / "half")).hf_config.dtype == torch.bfloat16


@pytest.mark.parametrize(("ranks", "place"), [(1, 0), (2, 0), (2, 1)])
def test_packed_documents_train_as_if_alone(out: Path, ranks: int, place: int) -> None:
    """With attention of both kinds: losses of the eight documents, their sum in a training step, and the norm
    of its gradient."""
    found = read(out, f"packed_{ranks}")[place]
    assert len(found["packed"]) == 8 + 2
    assert found["packed"] == pytest.approx(found["alone"], rel=1e-5)


def test_no_target_anywhere_a_spike_or_nan_on_one_rank_stops_all_and_changes_nothing(out: Path) -> None:
    for rank in range(2):
        outcome = read(out, f"raised_{rank}")
        assert outcome == {
            "errors": ["UserError", "LossSpikeError", "GradientSpikeError", "NonFiniteError"],
            "moved": ["parameter model.norm.weight"],  # NaN is not equal to itself
            "steps": 0,
        }
