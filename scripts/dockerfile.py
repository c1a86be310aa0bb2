"""Reads a Dockerfile as far as this project's go: what the chroot runner and the tests need of one.

What it does not know (other escape characters, here-documents, ONBUILD) is an error, never passed over.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KEYWORDS = frozenset(
    ("ARG", "CMD", "COPY", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "SHELL", "STOPSIGNAL", "USER", "WORKDIR")
)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s+")


class DockerfileError(ValueError):
    """A line that is not understood, or a stage that is not there."""


@dataclass(frozen=True)
class Instruction:
    """``KEYWORD [--flag=value ...] arguments``, continuation lines joined by a blank."""

    line: int
    keyword: str
    arguments: str
    flags: dict[str, str]

    def words(self) -> list[str]:
        """The arguments as a list: of the JSON form, or as a shell splits them."""
        if self.arguments.startswith("["):
            return [str(word) for word in json.loads(self.arguments)]
        return shlex.split(self.arguments)

    def assignments(self) -> dict[str, str]:
        """``NAME=value ...`` of ARG, ENV and LABEL; a bare ARG has no value and is left out."""
        return dict(word.split("=", 1) for word in self.words() if "=" in word)


@dataclass
class Stage:
    """From one FROM to the next. ``base`` is an image or the name of an earlier stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse_dockerfile(text: str) -> list[Stage]:
    """The stages in order; ARGs before the first FROM are filled into the bases.

    Raises:
        DockerfileError: with the number of the line.
    """
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            stages.append(_stage(instruction, arguments, default_name=str(len(stages))))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            arguments |= instruction.assignments()
        else:
            raise DockerfileError(f"line {instruction.line}: {instruction.keyword} before the first FROM")
    return stages


def stages_to(stages: list[Stage], target: str) -> list[Stage]:
    """``target`` and the stages that it is made from, the first one (whose base is an image) first.

    Raises:
        DockerfileError: there is no such stage.
    """
    by_name = {stage.name: stage for stage in stages}
    if target not in by_name:
        raise DockerfileError(f"no stage {target}: there are {', '.join(by_name)}")
    chain = [by_name[target]]
    while chain[0].base in by_name:
        chain.insert(0, by_name[chain[0].base])
    return chain


def fill(text: str, values: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` replaced; an unknown one becomes nothing, as Docker has it."""
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)


def _instructions(text: str) -> Iterator[Instruction]:
    for number, line in _logical_lines(text):
        keyword, _, rest = line.partition(" ")
        keyword = keyword.upper()
        if keyword not in KEYWORDS:
            raise DockerfileError(f"line {number}: {keyword} is not known here")
        if "<<" in rest:
            raise DockerfileError(f"line {number}: here-documents are not known here")
        flags = {}
        rest = rest.strip()
        while match := _FLAG.match(rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        yield Instruction(number, keyword, rest, flags)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Continuation lines joined; comments and blank lines left out, also those within a continuation."""
    if re.match(r"#\s*escape\s*=", text, re.IGNORECASE):
        raise DockerfileError("line 1: another escape character is not known here")
    start, parts = 0, list[str]()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start or number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            yield start, " ".join(parts)
            start, parts = 0, []
    if parts:
        raise DockerfileError(f"line {start}: the last line is continued by none")


def _stage(instruction: Instruction, arguments: Mapping[str, str], *, default_name: str) -> Stage:
    words = fill(instruction.arguments, arguments).split()
    if len(words) == 1:
        return Stage(default_name, words[0])
    if len(words) == 3 and words[1].upper() == "AS":
        return Stage(words[2], words[0])
    raise DockerfileError(f"line {instruction.line}: write FROM image AS name")
