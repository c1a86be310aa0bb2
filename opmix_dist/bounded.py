"""Reading files that somebody else may have written: ordinary files only, and never more than is allowed.

A named pipe or a device under a familiar name would keep its reader waiting or feed it without end, and a
file of holes has any size at no cost to whoever made it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from opmix_dist.errors import UserError


def open_ordinary(path: Path, flags: int = os.O_RDONLY) -> int:
    """Descriptor of an ordinary file.

    Args:
        flags: as of os.open; symbolic links are followed where they do not say otherwise.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it is a folder, a pipe, a device or a link that leads nowhere; names it.
        OSError: as of opening.
    """
    try:
        # a pipe without a writer would block already when it is opened
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path} is no ordinary file: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no ordinary file: remove it")
    return descriptor


def require_ordinary(path: Path, max_bytes: int | None = None) -> None:
    """For files that a library opens by their names; raises as :func:`read_bounded`."""
    descriptor = open_ordinary(path)
    try:
        _check_size(path, descriptor, max_bytes)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of an ordinary file.

    Raises:
        UserError: as :func:`open_ordinary`, or it has more than ``max_bytes``.
        OSError: as of opening and reading.
    """
    with open(open_ordinary(path), "rb") as file:
        return file.read(_check_size(path, file.fileno(), max_bytes))


def read_json(path: Path, max_bytes: int) -> Any:
    """As :func:`read_bounded`; UserError too where the content is no JSON, or has a number of more than 4,300
    digits."""
    try:
        return json.loads(read_bounded(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _check_size(path: Path, descriptor: int, max_bytes: int | None) -> int:
    size = os.fstat(descriptor).st_size
    if max_bytes is not None and size > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes} bytes ({size}): it is not read")
    return size
