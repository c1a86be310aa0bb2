"""What a process need not import: torch costs over a second and 200 MB, transformers four more seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT

CODE = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
LIGHT = ("cli", "observe.glance", "report.page", "launch.watching", "data.ingest")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        *((module, ("torch", "transformers", "cvxpy")) for module in LIGHT),
        ("train.roles", ("transformers", "peft", "cvxpy", "opmix_dist.train.job")),
        ("pool.supervisor", ("transformers", "peft", "cvxpy")),
    ],
)
def test_a_process_imports_what_it_needs(module: str, heavy: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"opmix_dist.{module}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & set(heavy) == set()
