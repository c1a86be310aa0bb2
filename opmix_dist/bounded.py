"""Reading files that somebody else may have written: ordinary files only, and never more than is allowed.

A named pipe or a device under a familiar name would keep its reader waiting or feed it without end, and a
file of holes has any size at no cost to whoever made it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from opmix_dist.errors import UserError

MAX_TEXT_BYTES = 16 << 20
"""Of a file that a person may have written: configuration, template."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of an ordinary file; symbolic links are followed.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it is no ordinary file, or has more than ``max_bytes``; names it.
        OSError: as of reading.
    """
    # a pipe without a writer would block already when it is opened
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is no ordinary file: remove it")
        if found.st_size > max_bytes:
            raise UserError(f"{path} has {found.st_size} bytes; more than {max_bytes} are not read")
        return file.read(max_bytes)
