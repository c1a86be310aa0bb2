"""Pages of ``docs`` that hold what they say: ``bash`` blocks are run, ``text`` blocks are compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """What stands between two fences, and for ``bash`` what it printed."""

    language: str
    content: str
    output: str = ""


def read_blocks(text: str) -> list[Block]:
    return [Block(*found) for found in _FENCE.findall(text)]


def run_blocks(blocks: Iterable[Block], folder: Path) -> None:
    """Run each ``bash`` block in ``folder``, in order, and keep what it prints."""
    for block in blocks:
        if block.language == "bash":
            block.output = run(block.content, folder)


def run(commands: str, folder: Path) -> str:
    """What ``commands`` print to both streams; fails when one of them does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}"
    return done.stdout


def compare_shown(blocks: Iterable[Block]) -> int:
    """Lines of ``text`` blocks, each of which the ``bash`` block above printed; fails when it did not.

    Spaces count as one, and a line that is cut ends in ``...``.
    """
    printed: list[str] = []
    compared = 0
    for block in blocks:
        if block.language == "bash":
            printed = [" ".join(line.split()) for line in block.output.splitlines()]
        elif block.language == "text":
            for line in block.content.splitlines():
                start, cut, _ = " ".join(line.split()).partition(" ...")
                found = [one for one in printed if (one.startswith(start) if cut else one == start)]
                assert found, f"{line}\nnot in\n" + "\n".join(printed)
                compared += 1
    return compared
