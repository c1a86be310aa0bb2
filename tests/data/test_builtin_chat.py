"""Built-in chats: calls that the functions would take, answers that are right, splits that share nothing."""

from __future__ import annotations

import importlib
import inspect
import json
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

from opmix_dist.data.builtin_answers import GAP, LETTERS
from opmix_dist.data.builtin_chat import RECIPES, BuiltinChatSource
from opmix_dist.data.catalogue import TASKS_FILE, Catalogue
from opmix_dist.data.ingest import PrepareConfig, prepare
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.source import Conversation
from opmix_dist.errors import UserError
from opmix_dist.exchange.files import read_jsonl

MAX_BYTES = 60_000


def conversations(name: str, *, seed: int = 0, max_bytes: int = MAX_BYTES) -> list[Conversation]:
    source = BuiltinChatSource(name, max_bytes, seed)
    return [c for _, chunk in source.chunks() for _, c in chunk.documents() if isinstance(c, Conversation)]


def content(conversation: Conversation, turn: int) -> str:
    return str(conversation.messages[turn]["content"])


def test_every_call_is_one_that_its_function_takes() -> None:
    for one in conversations("tools"):
        call = json.loads(content(one, 1))
        module, _, name = call["name"].rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert set(call["arguments"]) <= set(signature.parameters)
        assert {n for n, p in signature.parameters.items() if p.default is p.empty and p.kind < 2} <= set(
            call["arguments"]
        )
        question = content(one, 0)
        assert all(f"{n} {json.dumps(value)}" in question for n, value in call["arguments"].items())
        assert f"{call['name']}(" in question
        assert one.task is not None
        assert one.task["answer"] == call


def test_answers_are_right() -> None:
    kinds = set()
    for one in conversations("answers"):
        question, answer = content(one, 0), content(one, 1)
        assert one.task is not None
        assert one.task["answer"] == answer
        text = " ".join(topics[str(one.group).removeprefix("answers/")].split())
        kinds.add(one.task["kind"])
        if one.task["kind"] == "exact_match":
            _, sentence = question.split("\n")
            assert sentence.replace(GAP, f'"{answer}"', 1) in text
        else:
            _, sentence, *options = question.split("\n")
            assert sentence in text
            right = options[LETTERS.index(answer)].removeprefix(f"{answer}) ")
            assert text.startswith(right)
            assert len(set(options)) == len(LETTERS)
    assert kinds == {"exact_match", "multiple_choice"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_choice_follows_the_seed(name: str) -> None:
    assert conversations(name) == conversations(name)
    assert conversations(name) != conversations(name, seed=1)
    size = sum(len(content(c, t).encode()) for c in conversations(name) for t in (0, 1))
    assert MAX_BYTES <= size < 1.5 * MAX_BYTES


@pytest.fixture(scope="module")
def prepared(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    out = tmp_path_factory.mktemp("chats")
    config = PrepareConfig(
        out=out, builtin_chat=["tools", "answers"], builtin_max_bytes=MAX_BYTES, vocab_size=600,
        sequence_length=192, eval_fraction=0.25, workers=1,
    )  # fmt: skip
    return prepare(config, Console(quiet=True))


def test_a_function_or_topic_is_on_one_side_only(prepared: Catalogue) -> None:
    """Also: tasks are those of the held-out conversations, all of them."""
    decode = prepared.load_tokenizer().decode
    for name in ("tools", "answers"):
        sides = defaultdict(set)
        found = {content(one, 0): one for one in conversations(name)}
        told = {task["messages"][0]["content"]: task for task in read_jsonl(_tasks(prepared, name))}
        for split in ("train", "eval"):
            shards = ShardedSplit(prepared.split_dir(name, split), verify=True)
            text = "".join(decode(shards.read(i).tokens) for i in range(len(shards)))
            for question, one in found.items():
                if f"{question}<|endoftext|>" in text:
                    sides[one.group].add(split)
        assert all(len(split) == 1 for split in sides.values())
        held_out = {group for group, split in sides.items() if split == {"eval"}}
        assert 0 < len(held_out) < len(sides)
        assert told == {q: one.task for q, one in found.items() if one.group in held_out}


def _tasks(catalogue: Catalogue, name: str) -> Path:
    return catalogue.root / name / TASKS_FILE


def test_what_is_learnt_is_the_reply_and_its_end(prepared: Catalogue) -> None:
    tokenizer = prepared.load_tokenizer()
    sample = ShardedSplit(prepared.split_dir("tools", "train"), verify=True).read(0)
    assert sample.spans is not None
    text = tokenizer.decode(sample.tokens[slice(*sample.spans[0])])
    assert text.endswith("<|endoftext|>")
    assert set(json.loads(text.removesuffix("<|endoftext|>"))) == {"name", "arguments"}


def test_unknown_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--builtin-chat nope is none of answers, tools"):
        PrepareConfig(out=tmp_path, builtin_chat=["nope"])
    with pytest.raises(UserError, match="tools is a --builtin-chat and a domain of yours"):
        PrepareConfig(out=tmp_path, domains={"tools": ["x"]}, builtin_chat=["tools"])
