"""Rows, of JSON lines or of columns, to documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opmix_dist.data.source import Conversation
from opmix_dist.errors import UserError

TOOLS_FIELD = "tools"


@dataclass(frozen=True)
class Fields:
    """Where in a row its document is: a text, or a chat when ``messages`` is set."""

    text: str = "text"
    messages: str | None = None

    def columns(self, present: Sequence[str], name: str) -> list[str]:
        """Those of a file's columns that are needed; UserError when the document's is not ``present``."""
        wanted = self.messages or self.text
        if wanted not in present:
            option = "--messages-field" if self.messages else "--text-field"
            raise UserError(
                f"{name} has no column {wanted!r}, but {', '.join(present)}: name one with {option}"
            )
        return [wanted, TOOLS_FIELD] if self.messages and TOOLS_FIELD in present else [wanted]

    def document(self, row: Any, where: str) -> str | Conversation:
        """The document of a row; ``where`` is its file and line or row, for the UserError."""
        wanted = self.messages or self.text
        if not isinstance(row, dict) or wanted not in row:
            what, option = ("chat", "--messages-field") if self.messages else ("text", "--text-field")
            present = f", but {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) and row else ""
            raise UserError(f"{where} has no field {wanted!r}{present}: name the {what}'s with {option}")
        if self.messages:
            return _conversation(row, self.messages, where)
        return checked_text(row[self.text], self.text, where)


def parse_line(line: bytes, where: str) -> Any:
    """One JSON value; UserError when the line is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend or remove that line") from None


def checked_text(text: Any, field: str, where: str) -> str:
    """``text``, when it is one that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {type(text).__name__}, not text: mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {field!r} has half a surrogate pair: mend or remove it") from None
    return text


def _conversation(row: Mapping[str, Any], field: str, where: str) -> Conversation:
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {field!r} is not a list of messages with at least one: mend or remove it")
    checked = [_message(message, f"{field}[{i}]", where) for i, message in enumerate(messages)]
    return Conversation(checked, _tools(row.get(TOOLS_FIELD), where))


def _message(message: Any, key: str, where: str) -> dict[str, Any]:
    """A message without keys of value None, which columns put where another row has a value."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: {key!r} is {type(message).__name__}, not an object: mend or remove it")
    given = {name: value for name, value in message.items() if value is not None}
    checked_text(given.get("role"), f"{key}.role", where)
    if "content" in given or not given.get("tool_calls"):
        checked_text(given.get("content"), f"{key}.content", where)
    return {"content": None, **given}


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Definitions of tools; a string is JSON, as columns cannot hold schemas that differ."""
    if isinstance(tools, str):
        tools = parse_line(tools.encode("utf-8", "surrogatepass"), f"{where}: {TOOLS_FIELD!r}")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: {TOOLS_FIELD!r} is not a list of objects: mend or remove it")
    return tools
