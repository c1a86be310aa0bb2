"""Files that are replaced whole: whoever reads them sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".*.tmp"
"""Glob of what a process that was killed while it wrote may leave beside a file."""


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically: temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed and had our number
        with open(temporary, "xb") as file:  # never through a link that somebody placed there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` atomically; NaN and inf are refused because JSON has neither."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode())
