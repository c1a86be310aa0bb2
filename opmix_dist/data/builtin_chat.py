"""Two built-in domains of chats, which every installation can make: tasks with real structure and a scorer.

=========  ==================================================================================================
tools      calls of functions of the standard library: signatures, a wish in words, the call as JSON
answers    questions about Python's language reference (``pydoc_data``): multiple choice, and gaps to fill
=========  ==================================================================================================

The conversations of one function or of one topic are held out together, so that what is evaluated was never
trained on. Each conversation tells how its reply is scored; those of the held-out ones become the domain's
``tasks.jsonl``. The text follows the installed Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from opmix_dist.data import builtin_answers, builtin_tools
from opmix_dist.data.source import START, Chunk, Conversation, Document, Place, SourceFile
from opmix_dist.errors import UserError

MIN_BYTES = 20_000

TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For tokenizers that are trained here, which have no special token but EOS: it ends each turn."""


@dataclass(frozen=True)
class Recipe:
    """How a domain is made.

    files: what the text comes from.
    groups: given the seed, the conversations of each function or topic, and the number of its file; files in
        ascending order.
    """

    files: Callable[[], Sequence[SourceFile]]
    groups: Callable[[int], Iterable[tuple[int, Sequence[Conversation]]]]


RECIPES = {
    "answers": Recipe(builtin_answers.files, builtin_answers.groups),
    "tools": Recipe(builtin_tools.files, builtin_tools.groups),
}


@dataclass(frozen=True)
class BuiltinChatSource:
    """One of them: whole groups in a seeded choice of about ``max_bytes`` of UTF-8.

    Raises:
        UserError: when it is read and this installation holds too little of it.
    """

    domain: str
    max_bytes: int
    seed: int

    @property
    def names(self) -> Sequence[str]:
        return [f"builtin:{self.domain}"]

    def files(self) -> Sequence[SourceFile]:
        return RECIPES[self.domain].files()

    def chunks(self, start: Place = START) -> Iterator[tuple[Place, Chunk]]:
        """One for each file that gives conversations."""
        of_file: dict[int, list[Conversation]] = {}
        for number, conversations in self._chosen:
            of_file.setdefault(number, []).extend(conversations)
        for number, conversations in of_file.items():
            if Place(number, 0) >= start:
                yield Place(number, 0), ChatChunk(number, conversations)

    @cached_property
    def _chosen(self) -> list[tuple[int, Sequence[Conversation]]]:
        groups = list(RECIPES[self.domain].groups(self.seed))
        sizes = [sum(map(_bytes, conversations)) for _, conversations in groups]
        if sum(sizes) < MIN_BYTES:
            raise UserError(
                f"built-in domain {self.domain} finds only {sum(sizes)} bytes in this installation, fewer "
                f"than {MIN_BYTES}: is Python's standard library complete?"
            )
        order = sorted(range(len(groups)), key=lambda i: _drawn(self.seed, groups[i][1][0].group))
        chosen, left = [], self.max_bytes
        for i in order:
            if left > 0:
                chosen.append(i)
                left -= sizes[i]
        return [groups[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class ChatChunk:
    """The conversations of one file."""

    file: int
    conversations: Sequence[Conversation]

    def documents(self) -> Iterator[tuple[int, Document]]:
        return ((self.file, conversation) for conversation in self.conversations)


def _bytes(conversation: Conversation) -> int:
    return sum(len(str(message["content"]).encode()) for message in conversation.messages)


def _drawn(seed: int, group: str | None) -> bytes:
    return hashlib.sha256(f"{seed}/{group}".encode()).digest()
