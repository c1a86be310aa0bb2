"""Learning from replies of its own: what is computed, that it falls, that a resume repeats it."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from opmix_dist.config import check_config
from opmix_dist.data.tokenizer import train_tokenizer
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.methods.conversations import Conversation, Text, documents
from opmix_dist.methods.generation import parameter_of
from opmix_dist.methods.on_policy import OnPolicy
from opmix_dist.methods.replied import RepliedBatch
from opmix_dist.train.checkpoint_storage import SafePlanner, SafeReader
from opmix_dist.train.roles import run_job
from tests.methods.on_policy_jobs import BATCH, LENGTH, built, job_config, make_data
from tests.train.jobs import complete

FROZEN = {"max_new_tokens": 8, "teacher": "frozen", "demonstration": " ({demonstration})"}
AVERAGED = {**FROZEN, "teacher": "ema", "ema_rate": 0.3}


def sdft(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "sdft", "sdft": {**settings, **more}}


@pytest.fixture(scope="module")
def data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("on_policy"))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_losses_are_kl_on_replies_and_cross_entropy_on_text(
    data: Path, tmp_path: Path, direction: str
) -> None:
    """Against one conversation at a time, with both models' logits whole."""
    method = sdft(AVERAGED, divergence=direction)
    with built(job_config(data, tmp_path / "run", method)) as parts:
        step, model = parts.method, parts.around.engine.model  # type: ignore[attr-defined]
        step.begin(0)
        with torch.no_grad():  # another teacher than the student
            for parameter in step.teacher.parameters():
                parameter.mul_(1.5)
        work = step.prepare(0, parts.microbatches)
        assert work.loss is not None
        assert len(work.microbatches) == len(parts.microbatches) == 2
        for before, after in zip(parts.microbatches, work.microbatches, strict=True):
            with torch.no_grad():
                found = work.loss(model, after)
            assert isinstance(after, RepliedBatch)
            assert found.tolist() == pytest.approx(
                by_hand(step, model, before, after, direction).tolist(), rel=1e-4
            )
    assert after.targets.min() > 0


def by_hand(
    method: OnPolicy, model: torch.nn.Module, before: Any, after: RepliedBatch, direction: str
) -> torch.Tensor:
    sums = torch.zeros(len(before))
    assert after.distilled is not None
    for row, wanted in enumerate(documents(before)):
        places = iter(after.tokens[row][after.distilled[row]].tolist())
        own = [slice(begin, end) for begin, end in borders(after, row)]
        for place, one in zip(own, wanted, strict=False):  # behind them there is padding
            if isinstance(one, Text):
                ids = torch.tensor(one.tokens[None].tolist())
                logs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
                sums[row] += F.nll_loss(logs, ids[0, 1:], reduction="sum").detach()
                continue
            assert isinstance(one, Conversation)
            document = after.tokens[row, place].tolist()
            assert document[: len(one.prompt)] == one.prompt
            reply = document[len(one.prompt) :]
            assert reply == [next(places) for _ in reply]
            with torch.no_grad():
                q = logits_of(model, one.prompt, reply).softmax(-1)
                p = logits_of(method.teacher, method.context(one), reply).softmax(-1)
            first, second = (q, p) if direction == "reverse" else (p, q)
            sums[row] += (first * (first / second).log()).sum()
    return sums


def borders(batch: RepliedBatch, row: int) -> list[tuple[int, int]]:
    assert batch.position_ids is not None
    starts = [*torch.nonzero(batch.position_ids[row] == 0)[:, 0].tolist(), batch.tokens.shape[1]]
    return list(pairwise(starts))


def logits_of(model: Any, before: list[int], reply: list[int]) -> torch.Tensor:
    """Of the reply's tokens, [n, V] float64."""
    found = model(input_ids=torch.tensor([[*before, *reply]])).logits.double()
    return found[0, len(before) - 1 : -1]


def test_the_kl_to_the_teacher_falls(data: Path, tmp_path: Path) -> None:
    with built(job_config(data, tmp_path / "run", sdft(FROZEN))) as parts:
        engine, method = parts.around.engine, parts.method
        method.begin(0)
        work = method.prepare(0, parts.microbatches)
        losses = [
            engine.train_step(work.microbatches, lr=3e-3, loss=work.loss).sample_losses.sum().item()
            for _ in range(3)
        ]
    assert losses[0] > losses[1] > losses[2]


def test_the_averaged_teacher_follows_by_its_share(data: Path, tmp_path: Path) -> None:
    """phi <- 0.7 phi + 0.3 theta after each step; the copy that samples becomes theta."""
    with built(job_config(data, tmp_path / "run", sdft(AVERAGED))) as parts:
        engine, method = parts.around.engine, parts.method
        method.begin(0)
        start = {name: tensor.clone() for name, tensor in engine.parameters()}
        work = method.prepare(0, parts.microbatches)
        engine.train_step(work.microbatches, lr=3e-3, loss=work.loss)
        method.applied(0)
        for name, theta in engine.parameters():
            assert not torch.equal(theta, start[name])
            assert torch.allclose(parameter_of(method.teacher, name), 0.7 * start[name] + 0.3 * theta)
            assert torch.equal(parameter_of(method.policy.model, name), theta)


def test_costs_are_those_of_the_passes(data: Path, tmp_path: Path) -> None:
    with built(job_config(data, tmp_path / "run", sdft(FROZEN))) as parts:
        engine, ledger = parts.around.engine, parts.around.ledger
        parts.method.begin(0)
        work = parts.method.prepare(0, parts.microbatches)
        engine.train_step(work.microbatches, lr=1e-3, loss=work.loss)
        student = sum(part.tokens.numel() for part in work.microbatches)
        teacher = sum(part.teacher.tokens.numel() for part in work.microbatches)  # type: ignore[attr-defined]
        numbers = parts.method.numbers()
        costs, flops = ledger.costs, engine.flops
    assert costs["teacher"].tokens == teacher
    assert costs["teacher"].flops == teacher * flops.forward
    assert costs["teacher"].seconds > 0
    assert costs["generation"].tokens >= numbers["replies"] * numbers["reply_tokens"]
    assert costs["generation"].flops == costs["generation"].tokens * flops.forward
    assert costs["generation"].seconds > 0
    assert costs["train"].flops == (student - BATCH * LENGTH) * flops.train()


@pytest.mark.parametrize("earlier", [{"name": "plain"}, sdft(AVERAGED)])
def test_moments_of_another_run_go_on_without_its_average(
    data: Path, tmp_path: Path, earlier: dict[str, Any]
) -> None:
    """The average begins at the weights that the run starts from."""
    run_job(check_config(job_config(data, tmp_path / "first", earlier, steps=2)))
    settings = job_config(data, tmp_path / "run", sdft(AVERAGED))
    settings |= {"model": {}, "start": {"run": str(tmp_path / "first"), "optimizer": "keep"}}
    ended = run(settings | {"train": {**settings["train"], "steps": 1}})
    begun = AutoModelForCausalLM.from_pretrained(RunDir(tmp_path / "first").export).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    kept = {
        "parameter": {name: torch.empty_like(begun[name])},
        "beside": {f"teacher.{name}": torch.empty_like(begun[name])},
    }
    dcp.load(kept, storage_reader=SafeReader(ended.checkpoint(1)), planner=SafePlanner(), no_dist=True)
    theta, average = kept["parameter"][name], kept["beside"][f"teacher.{name}"]
    assert not torch.equal(theta, begun[name])
    assert torch.allclose(average, 0.7 * begun[name] + 0.3 * theta)


def test_replies_follow_seed_and_step(data: Path, tmp_path: Path) -> None:
    with built(job_config(data, tmp_path / "run", sdft(FROZEN))) as parts:
        parts.method.begin(0)

        def tokens(step: int) -> list[list[int]]:
            return [
                part.tokens.tolist() for part in parts.method.prepare(step, parts.microbatches).microbatches
            ]

        first, again, later = tokens(0), tokens(0), tokens(1)
    assert first == again != later


@pytest.mark.parametrize("refresh", [1, 3])
def test_a_resume_repeats_it_exactly(data: Path, tmp_path: Path, refresh: int) -> None:
    """With an averaged teacher; with a copy that samples and is three steps old, of which the checkpoint at
    step 4 falls into the middle."""
    method = sdft(AVERAGED, refresh_steps=refresh)
    whole = run(job_config(data, tmp_path / "whole", method, steps=6))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = RunDir(tmp_path / "again")
    shutil.rmtree(again.checkpoint(6))
    shutil.rmtree(again.export)
    again.summary_file.unlink()
    kept = whole.train_file.read_text().splitlines(keepends=True)
    again.train_file.write_text("".join(kept[:4]))
    run(job_config(data, again.path, method, steps=6))
    assert lines(again) == lines(whole)
    assert [line.step for line in whole.train_lines()] == [1, 2, 3, 4, 5, 6]
    first, second = (AutoModelForCausalLM.from_pretrained(one.export) for one in (whole, again))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def run(config: dict[str, Any]) -> RunDir:
    run_job(check_config(config))
    return RunDir(config["run_dir"])


def lines(found: RunDir) -> list[tuple[Any, ...]]:
    return [(one.step, one.loss, one.domain_loss, one.grad_norm, one.method) for one in found.train_lines()]


def test_another_model_teaches(data: Path, tmp_path: Path) -> None:
    """A run's export is the teacher, and a student that is equal to it has nothing to learn from it."""
    plain = run(job_config(data, tmp_path / "plain", {"name": "plain"}, steps=2))
    method = {"name": "distill", "distill": {"teacher": str(plain.export), "max_new_tokens": 8}}
    config = job_config(data, tmp_path / "run", method, steps=1)
    config["model"] = {"checkpoint": str(plain.export)}
    config["mixture"]["initial"] = {"chats": 1.0, "notes": 0.0}
    (line,) = run(config).train_lines()
    assert abs(line.loss) < 1e-6
    other = job_config(data, tmp_path / "other", method, steps=2)
    assert run(other).train_lines()[0].domain_loss["chats"] > 1e-3


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("data", {"mask_documents": False}, "method.name sdft needs data.mask_documents"),
        ("data", {"domains": ["notes"]}, "none of data.domains has any"),
        ("method", {"name": "distill"}, "needs method.distill.teacher"),
        ("method", {"name": "distill", "distill": {"teacher": "one made here"}}, "has another tokenizer"),
        (
            "method",
            {"sdft": {"generation": "vllm"}},
            r"^method\.sdft\.generation vllm: vLLM is not installed",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    change: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr("opmix_dist.tasks.vllm.find_spec", lambda name: None)
    config = job_config(data, tmp_path / "run", sdft(FROZEN))
    config[section] |= change
    if section == "data" and "domains" in change:
        config["mixture"]["initial"] = "uniform"
    if change.get("distill"):
        train_tokenizer(["other words"], 300).save_pretrained(tmp_path / "teacher")
        change["distill"]["teacher"] = str(tmp_path / "teacher")
    with pytest.raises(UserError, match=said), built(config):
        pass


@pytest.mark.launch
def test_two_ranks_train_alike(data: Path, tmp_path: Path) -> None:
    """So cold that the likeliest token is drawn, whatever rank draws it."""
    method = sdft(AVERAGED, temperature=1e-4)
    alone = run(job_config(data, tmp_path / "alone", method, steps=3, micro_batch_size=2))
    both = complete(job_config(data, tmp_path / "both", method, steps=3, micro_batch_size=2), ranks=2)
    for one, other in zip(alone.train_lines(), both.train_lines(), strict=True):
        assert other.domain_loss == pytest.approx(one.domain_loss, rel=1e-3)
        assert other.method == pytest.approx(one.method)
    costs, other_costs = (found.summary().costs for found in (alone, both))
    for phase in ("generation", "teacher", "train"):
        assert other_costs[phase].flops > 0
    assert other_costs["teacher"].tokens >= costs["teacher"].tokens > 0
