"""Files that are either whole or absent: atomic JSON, appended JSONL, folders with a completion marker.

Every file in a run directory has one writer role. Readers bound the size of what they read and never see
a half-written file; a torn last line of a JSONL file (its writer was killed) is dropped.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opmix_dist import bounded
from opmix_dist.atomic import write_bytes, write_json
from opmix_dist.errors import UserError

log = logging.getLogger(__name__)
MAX_JSON_BYTES = 64 << 20
MAX_JSONL_BYTES = 4 << 30
COMPLETE = "COMPLETE.json"


def read_json(path: Path) -> Any:
    """Raises UserError naming the file when it is missing, too large or not JSON."""
    try:
        return bounded.read_json(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


def append_jsonl(path: Path, *values: Any, sync: bool = True) -> None:
    """Append a line for each value and fsync; a torn line that a killed writer left goes first.

    Args:
        sync: false: a killed writer leaves the lines, a machine that stops may lose them (:func:`sync_file`).

    Raises:
        OSError: nothing was appended. Also where ``path`` is a symbolic link: whoever could place it in the
            run directory would have the writer's own files written to.
    """
    lines = b"".join(json.dumps(value, allow_nan=False).encode() + b"\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # unbuffered: what a full disk did not take must not be tried again when the file is closed
    with open(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        end = _end_of_lines(file)
        try:
            file.truncate(end)
            rest = memoryview(lines)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def sync_file(path: Path) -> None:
    """Fsync what was appended to a file, if it exists."""
    if path.exists():
        with open(bounded.open_ordinary(path), "rb") as file:
            os.fsync(file.fileno())


_BLOCK_BYTES = 1 << 16


def _end_of_lines(file: io.FileIO) -> int:
    """Bytes up to the last newline, with it."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        last = file.read(end - start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        end = start
    return min(end, size)


class PatientLines:
    """Appends lines to a file; while it cannot be written (a full disk), they wait and nobody fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Any] = []

    def append(self, value: Any, *, sync: bool = True) -> None:
        """As :func:`append_jsonl`."""
        self._waiting.append(value)
        try:
            append_jsonl(self.path, *self._waiting, sync=sync)
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written (%s): its lines wait until it can", self.path, error)
            return
        if len(self._waiting) > 1:
            log.warning("%s is written again: %d lines had waited", self.path, len(self._waiting) - 1)
        self._waiting.clear()


def read_jsonl(path: Path) -> list[Any]:
    """All complete lines; none when the file does not exist.

    Raises:
        UserError: a line before the last is not JSON; names file and line.
    """
    try:
        lines = bounded.read_bounded(path, MAX_JSONL_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn or empty
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
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
