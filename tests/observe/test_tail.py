"""The end of a file that is being written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from opmix_dist.observe.tail import tail_of_jsonl


class Row(BaseModel):
    step: int


def steps(path: Path, max_bytes: int = 1000) -> tuple[list[int], int]:
    rows, invalid = tail_of_jsonl(path, Row, max_bytes)
    return [row.step for row in rows], invalid


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ([], 0)),
        (b'{"step": 1}\n{"step": 2, "more": 3}\n', ([1, 2], 0)),
        (b'{"step": 1}\n{"step": 2, "lo', ([1], 0)),
        (b'{"step": 1', ([], 0)),
        (b'{"step": 1}\nnonsense\n{"step": "x"}\n\xff\n' + b"[" * 300 + b'\n{"step": 4}\n', ([1, 4], 4)),
    ],
)
def test_torn_and_invalid_lines(tmp_path: Path, content: bytes, expected: tuple[list[int], int]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    assert steps(path) == expected


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert steps(tmp_path / "absent.jsonl") == ([], 0)


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [b'{"step": %d}\n' % step for step in range(10, 30)]  # 13 bytes each
    path.write_bytes(b"".join(lines))
    assert steps(path, max_bytes=40) == ([27, 28, 29], 0)
    assert steps(path, max_bytes=20 * 13) == (list(range(10, 30)), 0)
    path.write_bytes(b"x" * 10_000)
    assert steps(path, max_bytes=40) == ([], 0)
