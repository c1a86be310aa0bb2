"""Files that are either whole or absent: atomic JSON, appended JSONL, folders with a completion marker.

Every file in a run directory has one writer role. Readers bound the size of what they read and never see
a half-written file; a torn last line of a JSONL file (its writer was killed) is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opmix_dist.atomic import write_bytes, write_json
from opmix_dist.errors import UserError

MAX_JSON_BYTES = 64 << 20
MAX_JSONL_BYTES = 4 << 30
COMPLETE = "COMPLETE.json"


def read_json(path: Path) -> Any:
    """Raises UserError naming the file when it is missing, too large or not JSON."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes; more than {MAX_JSON_BYTES} are not read as JSON")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def append_jsonl(path: Path, value: Any, *, sync: bool = True) -> None:
    """Append one line and fsync it; a torn line that a killed writer left goes first.

    Args:
        sync: false: a killed writer leaves the line, a machine that stops may lose it (:func:`sync_file`).
    """
    line = json.dumps(value, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Fsync what was appended to a file, if it exists."""
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[Any]:
    """All complete lines; none when the file does not exist.

    Raises:
        UserError: a line before the last is not JSON; names file and line.
    """
    if not path.exists():
        return []
    if path.stat().st_size > MAX_JSONL_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSONL_BYTES} bytes")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn or empty
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise UserError(f"{path}:{number} is not valid JSON; mend or remove that line") from None
    return rows


def rewrite_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Replace the file atomically by ``rows``; only its writer role may, before it appends again."""
    write_bytes(path, b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))


def mark_complete(folder: Path, value: Any) -> None:
    """Write the completion marker, the last file of a folder that is read as a whole.

    It vouches for the others, which libraries wrote, so they are brought to the disk first.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    write_json(folder / COMPLETE, value)


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).is_file()


def require_complete(folder: Path, what: str) -> Any:
    """The marker's content; UserError when the folder was never finished."""
    if not is_complete(folder):
        raise UserError(f"{what} {folder} has no {COMPLETE}: it was never finished; delete it")
    return read_json(folder / COMPLETE)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill in between never leaves it looking complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
