"""The end of a file that somebody else is writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from opmix_dist.bounded import open_ordinary

M = TypeVar("M", bound=BaseModel)
MAX_TAIL_BYTES = 1 << 18


def tail_of_jsonl(path: Path, kind: type[M], max_bytes: int = MAX_TAIL_BYTES) -> tuple[list[M], int]:
    """The last rows of a JSONL file, and how many lines among them are no valid ``kind``.

    At most ``max_bytes`` are read, however long the file is; a first line that this cuts and a last line that
    is still being written count as neither. No file: no rows.

    Raises:
        OSError: the file is there and cannot be read.
        UserError: it is no ordinary file.
    """
    try:
        with open(open_ordinary(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            lines = file.read(max_bytes).split(b"\n")
    except FileNotFoundError:
        return [], 0
    rows, invalid = [], 0
    for line in lines[1 if size > max_bytes else 0 : -1]:
        try:
            rows.append(kind.model_validate(json.loads(line)))
        except (ValidationError, ValueError, RecursionError):
            invalid += 1
    return rows, invalid
