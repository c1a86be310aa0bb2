"""``tasks.jsonl`` of a domain: how replies to its held-out conversations are scored, a line for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opmix_dist.data.source import Chunk, Conversation
from opmix_dist.data.survey import Mark


def write_tasks(file: Path, chunks: Iterable[tuple[np.ndarray, Chunk]]) -> int:
    """Write the tasks of held-out conversations, in the domain's order; no file when there are none.

    Args:
        chunks: the domain's, each with the final marks of its documents, uint8 [n].

    Returns:
        Their number.

    Raises:
        OSError: the file cannot be written.
    """
    tasks = list(_tasks(chunks))
    if tasks:
        file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return len(tasks)


def _tasks(chunks: Iterable[tuple[np.ndarray, Chunk]]) -> Iterator[Any]:
    for marks, chunk in chunks:
        for mark, (_, document) in zip(marks.tolist(), chunk.documents(), strict=True):
            if mark == Mark.EVAL and isinstance(document, Conversation) and document.task is not None:
                yield document.task
