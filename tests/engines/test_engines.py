"""FSDP2 against one process, checkpoints over changing world sizes, exports: real ranks over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opmix_dist.models.loss import sample_loss_sums
from tests.engines.ranks import BATCH, LENGTH, LR, MICRO, global_batch
from tests.helpers import tiny_llama, torchrun, uneven_batch

pytestmark = pytest.mark.launch


def run(ranks: int, name: str, out: Path, option: str = "{}") -> None:
    out.mkdir(parents=True, exist_ok=True)
    torchrun(ranks, "tests.engines.ranks", name, str(out), option)


def curve(ranks: int, out: Path, **options: object) -> dict:
    run(ranks, "curve", out, json.dumps(options))
    return json.loads((out / "curve.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("single")
    return curve(1, out), out


def test_one_process_equals_a_loop_written_by_hand(one_process: tuple[dict, Path]) -> None:
    """The engine's micro-batches, scaling and clipping against the textbook loop on the whole batch."""
    model = tiny_llama(tied=True)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(8):
        batch = global_batch(step)
        labels = batch.tokens.masked_fill(~batch.loss_mask, -100)
        arguments = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "use_cache": False}
        loss = model(**arguments, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert one_process[0]["steps"][step] == pytest.approx([loss.item(), norm.item()], rel=2e-5)
    assert MICRO < BATCH


@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (3, {"activation_checkpointing": True})])
def test_fsdp_gives_the_same_curve(one_process, tmp_path: Path, ranks: int, options: dict) -> None:
    found, expected = curve(ranks, tmp_path, **options), one_process[0]
    torch.testing.assert_close(
        torch.tensor(found["steps"]), torch.tensor(expected["steps"]), rtol=1e-4, atol=0
    )
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)


def test_bf16_follows_float32(one_process: tuple[dict, Path], tmp_path: Path) -> None:
    found = curve(2, tmp_path, param_dtype="bfloat16")["steps"]
    for (loss, _), (expected, _) in zip(found, one_process[0]["steps"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
        assert loss != expected


def test_export_loads_with_transformers_and_scores_the_same(one_process, tmp_path: Path) -> None:
    sharded = curve(2, tmp_path)
    for out, result in ((tmp_path, sharded), (one_process[1], one_process[0])):
        model = AutoModelForCausalLM.from_pretrained(out / "hf").eval()
        losses = sample_loss_sums(model, uneven_batch(99, 7, LENGTH, mask_documents=True), batch_size=7)
        assert losses.tolist() == pytest.approx(result["evaluation"], rel=1e-6)


@pytest.mark.parametrize(("ranks", "attention"), [(1, "sdpa"), (2, "sdpa"), (2, "eager")])
def test_packed_documents_train_as_if_alone(tmp_path: Path, ranks: int, attention: str) -> None:
    """Losses of the eight documents, their sum in a training step, and the norm of its gradient."""
    run(ranks, "packed", tmp_path, attention)
    found = json.loads((tmp_path / "packed.json").read_text())
    assert len(found["packed"]) == 8 + 2
    assert found["packed"] == pytest.approx(found["alone"], rel=1e-5)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_resume_is_exact_and_works_on_other_world_sizes(tmp_path: Path, mode: str) -> None:
    run(2, "save", tmp_path, mode)
    expected = json.loads((tmp_path / "saved_2.json").read_text())
    run(2, "resume", tmp_path)
    assert json.loads((tmp_path / "resumed_2.json").read_text()) == expected, "not bit-identical"
    if mode == "async":
        for ranks in (1, 3):
            run(ranks, "resume", tmp_path)
            found = json.loads((tmp_path / f"resumed_{ranks}.json").read_text())
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)


def test_no_target_anywhere_or_nan_on_one_rank_stops_all_and_changes_nothing(tmp_path: Path) -> None:
    run(2, "non_finite", tmp_path)
    for rank in range(2):
        outcome = json.loads((tmp_path / f"raised_{rank}.json").read_text())
        assert outcome == {"errors": ["UserError", "NonFiniteError"], "moved": False}
