"""CONTRIBUTING's rule: lower floors never import higher ones."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opmix_dist"
KERNELS = ROOT / "kernels" / "opmix_kernels"
FLOORS = re.findall(r"^\| `opmix_dist/(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it, also within functions and for types only."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports would escape this test"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_package_is_a_floor() -> None:
    assert sorted(FLOORS) == sorted(folder.parent.name for folder in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_a_higher_one(floor: str) -> None:
    higher = tuple(f"opmix_dist.{name}." for name in FLOORS[FLOORS.index(floor) + 1 :])
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    found = [f"{file}: {name}" for file in files for name in imported(file) if f"{name}.".startswith(higher)]
    assert found == []


def test_the_kernels_need_torch_and_triton_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "opmix_kernels"}
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    found = [
        f"{file}: {name}" for file in files for name in imported(file) if name.split(".")[0] not in allowed
    ]
    assert found == []
