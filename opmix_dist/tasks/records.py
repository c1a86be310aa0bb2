"""A task file: JSON lines, each a prompt and how a reply to it is scored.

===============  ============================================================================================
kind             ``answer``
===============  ============================================================================================
multiple_choice  one of ``choices``: the replies to choose from, as the assistant would give them
exact_match      the reply, or a list of replies that are right
tool_call        ``{"name": ..., "arguments": {...}}``, or a list of such calls
callable         whatever ``scorer``, a ``module:function``, makes of it
===============  ============================================================================================
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from opmix_dist.bounded import read_bounded
from opmix_dist.data.catalogue import TASKS_FILE
from opmix_dist.data.source import Conversation
from opmix_dist.data.sources.rows import Fields
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import read_records
from opmix_dist.exchange.schemas import Record

Kind = Literal["multiple_choice", "exact_match", "tool_call", "callable"]
MAX_TASKS = 100_000
MAX_FILE_BYTES = 256 << 20

Text = Annotated[str, StringConstraints(min_length=1)]
ScorerPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


class Call(Record):
    """A tool call."""

    name: Text
    arguments: dict[str, Any]


class Task(Record):
    """One example."""

    kind: Kind
    messages: list[dict[str, Any]] = Field(min_length=1)
    """What the reply follows; the last one is not the assistant's."""
    tools: list[dict[str, Any]] | None = None
    """Definitions that the chat template writes."""
    answer: Any = None
    choices: list[Text] | None = None
    scorer: ScorerPath | None = None
    group: str = ""
    """What it is about; examples of one group are no independent ones."""

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        self._require_text()
        if (self.choices is not None) != (self.kind == "multiple_choice"):
            raise ValueError("choices belong to multiple_choice, which needs them")
        if (self.scorer is not None) != (self.kind == "callable"):
            raise ValueError("scorer belongs to callable, which needs it")
        if self.choices is not None and (
            len(self.choices) < 2
            or len({*self.choices}) < len(self.choices)
            or self.answer not in self.choices
        ):
            raise ValueError("choices must be two or more different ones, and the answer one of them")
        if self.kind == "exact_match" and not self.answers:
            raise ValueError("answer must be a text, or a list of texts")
        if self.kind == "tool_call" and not self.calls:
            raise ValueError('answer must be {"name": ..., "arguments": {...}}, or a list of such calls')
        return self

    def _require_text(self) -> None:
        """Of numbers that JSON has, and of characters that UTF-8 has."""
        try:
            json.dumps(self.model_dump(), allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a surrogate pair") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        try:
            Fields(messages="messages").document(self.model_dump(include={"messages", "tools"}), "messages")
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's, to which there is no reply")

    @property
    def digest(self) -> str:
        """SHA-256 of all that it asks and takes for right; ``group``, and fields that are not set, play no
        part."""
        content = self.model_dump(exclude={"group"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.messages, self.tools)

    @property
    def answers(self) -> list[str]:
        """Of exact_match: all texts that are right; none where ``answer`` is no such thing."""
        found = self.answer if isinstance(self.answer, list) else [self.answer]
        return found if all(isinstance(one, str) for one in found) else []

    @property
    def calls(self) -> list[Call]:
        """Of tool_call, in order; none where ``answer`` is no such thing."""
        return parse_calls(self.answer)


def parse_calls(value: Any) -> list[Call]:
    """Calls of a JSON value: one, or a list of them, none of which may be anything else; [] if it is not so.

    Arguments that are a string are the JSON of an object, as many APIs write them.
    """
    found = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or {*one} != {"name", "arguments"}:
            return []
        arguments = one["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(one["name"], str) or not one["name"] or not isinstance(arguments, dict):
            return []
        found.append(Call(name=one["name"], arguments=arguments))
    return found


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file, or of the folder of a domain that has some.

    Raises:
        UserError: there are none, or more than ``MAX_TASKS``; or a line is no task; names file and line.
    """
    file = path / TASKS_FILE if path.is_dir() else path
    try:
        content = read_bounded(file, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: name a file of tasks, or a domain's folder with one") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if content and not content.endswith(b"\n"):
        raise UserError(f"{file} ends within a line: is it whole? Put a line's end there if it is")
    if content.count(b"\n") > MAX_TASKS:
        raise UserError(f"{file} has more than {MAX_TASKS:,} lines: divide it")
    tasks = read_records(file, Task)
    if not tasks:
        raise UserError(f"{file} has no task")
    return tasks
