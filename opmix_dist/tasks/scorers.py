"""From the text of a reply to its error: 0 is right, 1 is wrong; callables give fractions too."""

from __future__ import annotations

import importlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from opmix_dist.errors import UserError
from opmix_dist.tasks.records import Task, parse_calls

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)


def normalised(text: str) -> str:
    """What two texts are compared by: Unicode's composed form (NFC), each run of white space as one blank,
    none at the ends. Case and punctuation count."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def choice_error(task: Task, reply: str) -> float:
    """The choice that the reply begins with, as a whole word, is taken; of several the longest."""
    text = normalised(reply)
    begun = [choice for choice in task.choices or () if _begins(text, normalised(choice))]
    return float(not begun or max(begun, key=len) != task.answer)


def _begins(text: str, choice: str) -> bool:
    following = text[len(choice) : len(choice) + 1]
    return text.startswith(choice) and not (choice[-1:].isalnum() and following.isalnum())


def exact_error(task: Task, reply: str) -> float:
    """The whole reply must be one of the answers, after :func:`normalised`."""
    return float(normalised(reply) not in {normalised(answer) for answer in task.answers})


def call_error(task: Task, reply: str) -> float:
    """The reply must be JSON, alone or alone in a code fence; every call's name and arguments must be equal,
    in order. Numbers are equal by value (1 and 1.0), but no boolean is a number; keys may have any order."""
    text = reply.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return 1.0
    calls = parse_calls(value)
    wanted = [(call.name, call.arguments) for call in task.calls]
    return float(not _same([[call.name, call.arguments] for call in calls], [list(one) for one in wanted]))


def _same(one: Any, other: Any) -> bool:
    """Of JSON values; Python's own equality takes True for 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def error_of(task: Task, reply: str, *, allow_code: bool = False) -> float:
    """Error of a reply, in 0..1.

    Args:
        allow_code: import the scorers that tasks name and call them.

    Raises:
        UserError: a task names a scorer and that is not allowed, or the scorer cannot be had or fails.
    """
    if task.kind == "callable":
        return _called(task, reply, allow_code)
    return {"multiple_choice": choice_error, "exact_match": exact_error, "tool_call": call_error}[task.kind](
        task, reply
    )


def _called(task: Task, reply: str, allow_code: bool) -> float:
    scorer = str(task.scorer)
    if not allow_code:
        raise UserError(
            f"a task names the scorer {scorer}, which is code of yours: pass --allow-code to run it"
        )
    function = load_scorer(scorer)
    try:
        error = float(function(task.model_dump(), reply))
    except Exception as problem:  # whatever the user's code raises
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise UserError(f"the scorer {scorer} failed ({reason}): mend it") from problem
    if not (math.isfinite(error) and 0.0 <= error <= 1.0):
        raise UserError(f"the scorer {scorer} gave {error}: an error lies in 0..1, and 0 is right")
    return error


def load_scorer(path: str) -> Callable[[dict[str, Any], str], float]:
    """The function ``module:function``, which is given a task and a reply.

    Raises:
        UserError: there is no such thing.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the scorer {path} cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"the scorer {path} is no function")
    return function
