"""The examples of kernels/README.md run as they stand."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import opmix_kernels

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    exec(compile("\n".join(blocks), str(README), "exec"), {})


def test_every_operation_has_a_line() -> None:
    operations = {name for name, value in vars(opmix_kernels).items() if inspect.isfunction(value)}
    assert operations == set(re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.MULTILINE))
