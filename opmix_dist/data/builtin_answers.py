"""``answers``: questions about Python's language reference, from the topics that ``help()`` prints.

User:       Which section says this?
            It selects exactly one of the suites by evaluating the expressions one by one.
            A) Lambdas
            B) The "if" statement
            C) Truth Value Testing
            D) Slicings
Assistant:  B

User:       Fill the gap ____, from the section: The "if" statement
            The ____ statement is used for conditional execution.
Assistant:  if
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from opmix_dist.data.source import Conversation, SourceFile
from opmix_dist.seeds import derive_seed

GAP = "____"
LETTERS = "ABCD"
SENTENCE_CHARS = (40, 180)
MAX_TITLE_CHARS = 40
MAX_SENTENCES = 40
"""Of one topic: the longest ones would be most of the domain."""

_QUOTED = re.compile(r'"([^"\s]{1,20})"')
_SENTENCE_END = re.compile(r"(?<=[.])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Topic:
    """A section of the reference."""

    key: str
    title: str
    sentences: Sequence[str]


def files() -> Sequence[SourceFile]:
    from pydoc_data import topics

    path = Path(topics.__file__)
    return [SourceFile(str(path), path.stat().st_size)]


def groups(seed: int) -> Iterator[tuple[int, Sequence[Conversation]]]:
    """The questions of each topic, drawn by the seed and its key; all are of one file, number 0."""
    found = _topics()
    for topic in found:
        rng = np.random.default_rng([derive_seed(seed, "answers", topic.key)])
        others = [other.title for other in found if other.title != topic.title]
        questions = []
        for i in sorted(rng.permutation(len(topic.sentences))[:MAX_SENTENCES].tolist()):
            sentence = topic.sentences[i]
            questions.append(_choice(topic, sentence, others, rng))
            if quoted := list(_QUOTED.finditer(sentence)):
                questions.append(_gap(topic, sentence, quoted[int(rng.integers(len(quoted)))]))
        if questions:
            yield 0, questions


def _choice(topic: Topic, sentence: str, others: Sequence[str], rng: np.random.Generator) -> Conversation:
    wrong = rng.choice(len(others), size=len(LETTERS) - 1, replace=False)
    right = int(rng.integers(len(LETTERS)))
    titles = [others[i] for i in wrong.tolist()]
    titles.insert(right, topic.title)
    options = "\n".join(f"{letter}) {title}" for letter, title in zip(LETTERS, titles, strict=True))
    question = f"Which section says this?\n{sentence}\n{options}"
    return _conversation(
        topic, question, LETTERS[right], {"kind": "multiple_choice", "choices": list(LETTERS)}
    )


def _gap(topic: Topic, sentence: str, quoted: re.Match[str]) -> Conversation:
    with_gap = f"{sentence[: quoted.start()]}{GAP}{sentence[quoted.end() :]}"
    question = f"Fill the gap {GAP}, from the section: {topic.title}\n{with_gap}"
    return _conversation(topic, question, quoted[1], {"kind": "exact_match"})


def _conversation(topic: Topic, question: str, answer: str, how: dict[str, object]) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    task = {"messages": messages[:1], **how, "answer": answer, "group": topic.key}
    return Conversation(messages, group=f"answers/{topic.key}", task=task)


@cache
def _topics() -> tuple[Topic, ...]:
    """Those with a short title, each title once, sorted by key."""
    from pydoc_data.topics import topics

    found: dict[str, Topic] = {}
    for key, text in sorted(topics.items()):
        title, _, body = text.strip().partition("\n")
        if len(title) <= MAX_TITLE_CHARS and title not in found and title.isascii():
            found[title] = Topic(key, title, list(_sentences(body)))
    return tuple(found.values())


def _sentences(body: str) -> Iterator[str]:
    """Whole sentences of the paragraphs that are prose: neither indented, nor lists, nor underlined."""
    least, most = SENTENCE_CHARS
    for paragraph in re.split(r"\n\s*\n", body):
        if not paragraph[:1].isalpha() and not paragraph.startswith('"'):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if least <= len(sentence) <= most and sentence.endswith(".") and sentence.isascii():
                yield sentence
