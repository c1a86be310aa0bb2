"""Scorers and error rates, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opmix_dist.errors import UserError
from opmix_dist.tasks.error_rates import ErrorRate, clusters, wilson_interval
from opmix_dist.tasks.records import Task, read_tasks
from opmix_dist.tasks.scorers import error_of

ASK = [{"role": "user", "content": "?"}]


def task(kind: str, answer: Any = None, **fields: Any) -> Task:
    return Task(kind=kind, messages=ASK, answer=answer, **fields)  # type: ignore[arg-type]


CHOICE = task("multiple_choice", "B", choices=["A", "B", "C"])
WORDS = task("multiple_choice", "red wine", choices=["red", "red wine"])
EXACT = task("exact_match", ["caf\u00e9 noir", "4"])
CALL = task("tool_call", {"name": "f", "arguments": {"n": 1, "flag": True, "s": "x y", "list": [1, 2.5]}})
TWO = task("tool_call", [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}])


@pytest.mark.parametrize(
    ("example", "reply", "error"),
    [
        (CHOICE, "B", 0.0),
        (CHOICE, " B) because", 0.0),
        (CHOICE, "A", 1.0),
        (CHOICE, "Because", 1.0),
        (CHOICE, "the answer is B", 1.0),
        (CHOICE, "", 1.0),
        (WORDS, "red wine, please", 0.0),
        (WORDS, "red", 1.0),
        (EXACT, "  cafe\u0301\n noir ", 0.0),
        (EXACT, "4", 0.0),
        (EXACT, "4.", 1.0),
        (EXACT, "Caf\u00e9 noir", 1.0),
        (CALL, '{"name": "f", "arguments": {"s": "x y", "flag": true, "n": 1.0, "list": [1, 2.5]}}', 0.0),
        (CALL, '```json\n{"name":"f","arguments":"{\\"s\\":\\"x y\\",\\"flag\\":true,\\"n\\":1,'
               '\\"list\\":[1,2.5]}"}\n```', 0.0),
        (CALL, '{"name": "f", "arguments": {"s": "x y", "flag": 1, "n": 1, "list": [1, 2.5]}}', 1.0),
        (CALL, '{"name": "f", "arguments": {"s": "x y", "flag": true, "n": true, "list": [1, 2.5]}}', 1.0),
        (CALL, '{"name": "f", "arguments": {"s": "x y", "flag": true, "n": 1, "list": [2.5, 1]}}', 1.0),
        (CALL, '{"name": "g", "arguments": {"s": "x y", "flag": true, "n": 1, "list": [1, 2.5]}}', 1.0),
        (CALL, '{"name": "f", "arguments": {"n": 1}}', 1.0),
        (CALL, 'Sure: {"name": "f", "arguments": {}}', 1.0),
        (CALL, '{"name": "f"', 1.0),
        (CALL, "[" * 100_000, 1.0),
        (TWO, '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', 0.0),
        (TWO, '[{"name": "g", "arguments": {}}, {"name": "f", "arguments": {}}]', 1.0),
    ],
)  # fmt: skip
def test_errors(example: Task, reply: str, error: float) -> None:
    assert error_of(example, reply) == error


def half_right(example: dict[str, Any], reply: str) -> float:
    return 0.5 if reply == example["answer"] else 1.0


def broken(example: dict[str, Any], reply: str) -> float:
    return {"nan": math.nan, "two": 2.0}[reply]


def test_code_runs_where_it_is_allowed_only() -> None:
    example = task("callable", "yes", scorer=f"{__name__}:half_right")
    assert error_of(example, "yes", allow_code=True) == 0.5
    with pytest.raises(UserError, match="--allow-code"):
        error_of(example, "yes")


@pytest.mark.parametrize(
    ("scorer", "reply", "said"),
    [
        ("broken", "nan", "gave nan"),
        ("broken", "two", "gave 2.0"),
        ("broken", "x", "failed .KeyError"),
        ("absent", "", "cannot be imported"),
    ],
)
def test_bad_scorers_are_named(scorer: str, reply: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{scorer} .*{said}|{scorer} {said}"):
        error_of(task("callable", scorer=f"{__name__}:{scorer}"), reply, allow_code=True)


def test_wilsons_interval() -> None:
    """Of 1 in 10 and of 0 in 10, from z = 1.959964: for p = 0, the bound is z^2 / (n + z^2)."""
    low, high = wilson_interval(0.1, 10)
    assert (low, high) == (pytest.approx(0.0178762, abs=1e-6), pytest.approx(0.4041500, abs=1e-6))
    z2 = 1.959963985**2
    assert wilson_interval(0.0, 10) == (pytest.approx(0.0, abs=1e-12), pytest.approx(z2 / (10 + z2)))
    assert wilson_interval(1.0, 10)[0] == pytest.approx(10 / (10 + z2))


def test_standard_errors_come_from_the_number_of_examples() -> None:
    """Errors 1, 0, 0, 0: the mean is 1/4, the variance (9/16 + 3/16) / 3 = 1/4, so s / sqrt(4) = 1/4."""
    rate = ErrorRate.of(np.array([1.0, 0.0, 0.0, 0.0]), [""] * 4)
    assert (rate.count, rate.groups, rate.mean, rate.stderr) == (4, 4, 0.25, pytest.approx(0.25))
    assert rate.effective == pytest.approx(4)
    assert (rate.low, rate.high) == pytest.approx(wilson_interval(0.25, 4))
    assert ErrorRate.of(np.array([1.0]), [""]).stderr == 0.0


def test_examples_of_a_group_are_not_independent() -> None:
    """Errors 1, 1 | 0, 0, 0 | 1 with mean 1/2: the groups' residuals are 1, -3/2 and 1/2, their squares 7/2,
    so the error is sqrt(3/2 * 7/2) / 6. The variance is (6 / 4) / 5 = 3/10, over 6 examples 1/20: these tell
    as much as 6 * (1/20) / (3/2 * 7/2 / 36) = 72/35 independent ones."""
    errors, groups = np.array([1.0, 0, 1, 0, 0, 1]), ["a", "b", "a", "b", "b", "c"]
    rate = ErrorRate.of(errors, groups)
    assert (rate.count, rate.groups, rate.mean) == (6, 3, 0.5)
    assert rate.stderr == pytest.approx(np.sqrt(5.25) / 6)
    assert rate.effective == pytest.approx(72 / 35)
    assert (rate.low, rate.high) == pytest.approx(wilson_interval(0.5, 72 / 35))
    assert clusters(["b", "", "a", "", "b"]).tolist() == [0, 1, 2, 3, 0]


def test_what_groups_cannot_tell() -> None:
    same = ErrorRate.of(np.zeros(6), ["a", "a", "a", "b", "b", "b"])
    assert (same.stderr, same.effective) == (0.0, 2.0), "nothing tells that they are less alike"
    one = ErrorRate.of(np.array([0.1, 0.2, 0.9]), ["a"] * 3)
    assert (one.stderr, one.effective) == (0.0, 1.0)
    opposed = ErrorRate.of(np.array([1.0, 0, 1, 0]), ["a", "a", "b", "b"])
    assert (opposed.stderr, opposed.effective) == (0.0, 4.0), "never more than there are examples"


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(f"{one.model_dump_json()}\n" for one in (CHOICE, EXACT, CALL)))
    assert read_tasks(file) == read_tasks(tmp_path) == [CHOICE, EXACT, CALL]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": ["A", "A"]}, "two or more different ones"),
        ({"answer": "D"}, "the answer one of them"),
        ({"choices": None}, "choices belong to multiple_choice"),
        ({"kind": "exact_match", "choices": None, "answer": [1]}, "a text, or a list of texts"),
        ({"kind": "tool_call", "choices": None}, "name"),
        ({"kind": "callable", "choices": None, "scorer": "os.system"}, "scorer"),
        ({"kind": "callable", "choices": None}, "scorer belongs to callable"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
        ({"messages": [{"role": 1}]}, "role"),
        ({"messages": []}, "messages"),
        ({"group": "\ud800"}, "surrogate"),
        ({"more": 1}, "more"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "tasks.jsonl"
    good = CHOICE.model_dump()
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, {**good, **change})))
    with pytest.raises(UserError, match=f"tasks.jsonl:2 is not a valid Task: .*{said}"):
        read_tasks(file)


@pytest.mark.parametrize(
    ("content", "said"), [("", "has no task"), ('{"kind"', "ends within a line"), (None, "is missing")]
)
def test_what_is_no_file_of_tasks(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tasks.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read_tasks(tmp_path)
