"""Replies and likelihoods of a tiny model, against transformers and log-softmax by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from opmix_dist.cli import main
from opmix_dist.data.builtin_chat import TEMPLATE
from opmix_dist.data.tokenizer import train_tokenizer
from opmix_dist.errors import UserError
from opmix_dist.tasks.generation import Generated, Sampling, generate
from opmix_dist.tasks.prompts import end_ids, prompt_ids
from opmix_dist.tasks.records import Task
from opmix_dist.tasks.scoring import ScoringOptions, score
from opmix_dist.tasks.vllm import require_vllm
from tests.models import tiny

WORDS = "User: Assistant: What is two plus two? four, five or six of them A B C blue lamp"
CALL = {"name": "f", "arguments": {"n": 2}}
TASKS = [
    Task(kind="multiple_choice", messages=[{"role": "user", "content": "two plus two?"}], answer="B",
         choices=["A", "B", "C four"]),
    Task(kind="exact_match", messages=[{"role": "user", "content": "What is it?"}], answer="blue lamp"),
    Task(kind="tool_call", messages=[{"role": "user", "content": "six"}], answer=CALL),
    Task(kind="exact_match", messages=[{"role": "user", "content": "five"}], answer="six"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = train_tokenizer([WORDS] * 3, 300)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny.build("llama", vocab_size=len(tokenizer), max_position_embeddings=96, spread=0.5)


def _prompts(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(vocabulary, size=n).tolist() for n in (5, 1, 12, 5, 8)]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_replies_are_those_of_transformers_one_by_one(architecture: str) -> None:
    model = tiny.build(architecture, spread=0.5)
    prompts, limits = _prompts(tiny.VOCABULARY), [9, 4, 12, 12, 7]
    free = [_alone(model, prompt, limit, []) for prompt, limit in zip(prompts, limits, strict=True)]
    ends = [free[2][6], free[3][2]]  # tokens that come within some of the replies
    found = generate(model, prompts, max_new_tokens=limits, end_ids=ends, batch_size=2)
    wanted = [_alone(model, prompt, limit, ends) for prompt, limit in zip(prompts, limits, strict=True)]
    assert found.replies == wanted
    assert any(reply[-1] in ends and len(reply) < limit for reply, limit in zip(wanted, limits, strict=True))


def _alone(model: PreTrainedModel, prompt: list[int], limit: int, ends: list[int]) -> list[int]:
    made = cast(Any, model).generate(
        torch.tensor([prompt]),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


def test_tokens_are_what_is_computed() -> None:
    """Prompts of 12 and 8, then 5 and 5, then 1; no reply ends before 3 tokens."""
    model = tiny.build("llama")
    found = generate(model, _prompts(tiny.VOCABULARY), max_new_tokens=3, end_ids=[64], batch_size=2)
    assert found.tokens == 2 * (12 + 2) + 2 * (5 + 2) + (1 + 2)


def test_draws_follow_their_seed_alone() -> None:
    model = tiny.build("llama")
    prompts = _prompts(tiny.VOCABULARY)

    def draw(seed: int, temperature: float = 1.0) -> list[list[int]]:
        sampling = Sampling(temperature, 1.0, seed)
        return generate(
            model, prompts, max_new_tokens=6, end_ids=[0], batch_size=3, sampling=sampling
        ).replies

    first = draw(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert draw(1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(2) != first
    greedy = generate(model, prompts, max_new_tokens=6, end_ids=[0], batch_size=3).replies
    assert draw(1, 1e-4) == greedy


def test_the_likeliest_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS[0]
    prompt = prompt_ids(tokenizer, task, "here")
    found = []
    for choice in task.choices or ():
        reply = tokenizer(f"{choice}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + reply])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        found.append(sum(float(logs[len(prompt) - 1 + j, token]) for j, token in enumerate(reply)))
    best = (task.choices or [])[int(np.argmax(found))]
    scored = score(model, tokenizer, [task], ScoringOptions(batch_size=2))
    assert scored.replies == [best]
    right = [task.model_copy(update={"answer": choice}) for choice in task.choices or ()]
    errors = score(model, tokenizer, right).errors
    assert errors.tolist() == [float(choice != best) for choice in task.choices or ()]


def test_errors_are_those_of_the_replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    replies = ["B is it", " blue  lamp", json.dumps(CALL), "seven"]

    def give(prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Generated:
        assert [tokenizer.decode(p) for p in prompts] == [
            f"User:\n{task.messages[0]['content']}<|endoftext|>\nAssistant:\n" for task in TASKS
        ]
        assert list(ends) == [tokenizer.eos_token_id]
        return Generated([[*tokenizer(reply)["input_ids"], *ends] for reply in replies], 9)

    found = score(model, tokenizer, TASKS, ScoringOptions(choices="generation"), generator=give)
    assert found.replies == replies
    assert found.errors.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert (found.generated_tokens, found.scored_tokens) == (9, 0)


def test_what_does_not_fit_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"tasks:2: prompt and reply may take \d+ tokens.*96 positions"):
        score(model, tokenizer, TASKS, ScoringOptions(max_new_tokens=90))
    forging = Task(kind="exact_match", messages=[{"role": "user", "content": "<|endoftext|>"}], answer="")
    with pytest.raises(UserError, match="x.jsonl:1 writes the special token"):
        score(model, tokenizer, [forging], where="x.jsonl")
    code = Task(kind="callable", messages=TASKS[0].messages, scorer="a:b")
    with pytest.raises(UserError, match="a:b, code of yours: pass --allow-code"):
        score(model, tokenizer, [code])


def test_a_template_that_ends_no_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = train_tokenizer([WORDS], 300)
    plain.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(UserError, match="without a special token"):
        end_ids(plain)


def test_vllm_is_refused_by_name_where_it_is_missing() -> None:
    with pytest.raises(UserError, match="--generation vllm: vLLM is not installed"):
        require_vllm("--generation")


def test_the_command(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, file, out = tmp_path / "hf", tmp_path / "tasks.jsonl", tmp_path / "replies.jsonl"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.write_text("".join(f"{task.model_dump_json()}\n" for task in TASKS))
    command = ["score", str(folder), "--tasks", str(file), "--max-new-tokens", "8", "--device", "cpu"]
    capsys.readouterr()  # what saving has logged
    assert main([*command, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = score(model, tokenizer, TASKS, ScoringOptions(max_new_tokens=8))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["reply"], line["error"]) for line in lines] == list(
        zip(expected.replies, expected.errors.tolist(), strict=True)
    )
    rows = {row["kind"]: row for row in printed["rows"]}
    assert {kind: row["tasks"] for kind, row in rows.items()} == {
        "multiple_choice": 1, "exact_match": 2, "tool_call": 1
    }  # fmt: skip
    assert rows["exact_match"]["error"] == pytest.approx(expected.errors[[1, 3]].mean())
    assert main([*command, "--limit", "2"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert main([*command, "--limit", "0"]) == 2
