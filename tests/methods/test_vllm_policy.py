"""Replies by vLLM: of which parameters they are, that a resume repeats them. test_sdft.py has refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opmix_dist.config import check_config
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.methods.vllm_policy import VLLMPolicy
from opmix_dist.tasks.generation import Generated, generate
from opmix_dist.train.roles import run_job
from tests.helpers import needs_vllm
from tests.methods.on_policy_jobs import built, job_config, make_data

FROZEN = {"max_new_tokens": 8, "teacher": "frozen", "demonstration": " ({demonstration})"}
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Of 32 dimensions, the fewest that vLLM's attention takes on a CPU."""


@pytest.fixture(scope="module")
def data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("vllm_policy"))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def vllm_job(data: Path, run: Path, *, tied: bool = False, steps: int = 4, **more: Any) -> dict[str, Any]:
    method = {"name": "sdft", "sdft": {**FROZEN, "generation": "vllm", **more}}
    given = job_config(data, run, method, steps=steps)
    given["model"]["config"] |= {**HEADS, "tie_word_embeddings": tied}
    return given


def test_colder_than_vllm_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.sdft.*temperature 0\.001 is below 0\.01"):
        check_config(vllm_job(tmp_path, tmp_path, temperature=0.001))
    check_config(vllm_job(tmp_path, tmp_path, temperature=0.001, generation="transformers"))


@needs_vllm
def test_what_vllm_cannot_run_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    """Heads of 8 dimensions. The trainer's own group outlives that, without which it could not leave."""
    given = job_config(data, tmp_path / "run", {"name": "sdft", "sdft": {**FROZEN, "generation": "vllm"}})
    said = r"^method\.sdft\.generation vllm: vLLM cannot run the model: .*head_dim"
    with pytest.raises(UserError, match=said), built(given):
        pass


@needs_vllm
@pytest.mark.parametrize("tied", [False, True])
def test_replies_are_of_the_parameters_at_each_refresh(data: Path, tmp_path: Path, tied: bool) -> None:
    """Those of transformers, from the student itself, which two large steps have moved far."""
    with built(vllm_job(data, tmp_path / "run", tied=tied)) as parts:
        engine, method = parts.around.engine, parts.method
        policy = method.policy
        assert isinstance(policy, VLLMPolicy)
        assert isinstance(engine, SingleEngine)
        prompts = [[5, 6, 7, 8], [9] * 20, [11, 12]]
        found = []
        method.begin(0)
        for step in range(3):
            student = engine.model
            limits, ends = [12, 5, 12], method.end_ids
            here = generate(student, prompts, max_new_tokens=limits, end_ids=ends, batch_size=3)
            made = policy._llm.generate(prompts, limits, end_ids=ends)
            assert made.replies == here.replies
            assert made.tokens == sum(map(len, prompts)) + sum(len(reply) - 1 for reply in made.replies)
            found.append(made.replies)
            work = method.prepare(step, parts.microbatches)
            engine.train_step(work.microbatches, lr=0.05, loss=work.loss)
            method.applied(step)
        assert found[0] != found[1] != found[2]


@needs_vllm
def test_draws_follow_seed_and_place(data: Path, tmp_path: Path) -> None:
    """Whatever else is replied to; and by the temperature: the untrained model's tokens are about equally
    likely, so that 64 draws of 320 tokens repeat few, unless only the likeliest may be drawn."""
    with built(vllm_job(data, tmp_path / "run", max_new_tokens=8)) as parts:
        method, policy = parts.method, parts.method.policy
        assert isinstance(policy, VLLMPolicy)
        method.begin(0)

        def draw(prompts: int, seed: int) -> list[list[int]]:
            state = torch.get_rng_state()
            made: Generated = policy.sample([[5, 6, 7]] * prompts, [8] * prompts, seed)
            assert torch.equal(torch.get_rng_state(), state), "the trainer's own draws stay as they are"
            return made.replies

        first = draw(8, 1)
        assert draw(8, 1) == first
        assert draw(4, 1) == first[:4]
        assert draw(8, 2) != first
        assert len({token for reply in first for token in reply}) > 32
        object.__setattr__(policy.config, "top_p", 1e-6)
        assert len({tuple(reply) for reply in draw(8, 1)}) == 1


@needs_vllm
def test_a_resume_repeats_it_exactly(data: Path, tmp_path: Path) -> None:
    """The checkpoint at step 4 falls between refreshes at 3 and 6; engines follow each other in a process."""
    whole = run(vllm_job(data, tmp_path / "whole", steps=6, refresh_steps=3))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = RunDir(tmp_path / "again")
    shutil.rmtree(again.checkpoint(6))
    shutil.rmtree(again.export)
    again.summary_file.unlink()
    again.train_file.write_text("".join(whole.train_file.read_text().splitlines(keepends=True)[:4]))
    run(vllm_job(data, again.path, steps=6, refresh_steps=3))
    assert lines(again) == lines(whole)
    assert [line.step for line in whole.train_lines()] == [1, 2, 3, 4, 5, 6]
    cost = whole.summary().costs["generation"]
    assert cost.tokens > 0
    assert cost.flops > 0


def run(config: dict[str, Any]) -> RunDir:
    run_job(check_config(config))
    return RunDir(config["run_dir"])


def lines(found: RunDir) -> list[tuple[Any, ...]]:
    return [(one.step, one.loss, one.domain_loss, one.grad_norm, one.method) for one in found.train_lines()]
