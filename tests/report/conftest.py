from __future__ import annotations

from pathlib import Path

import pytest

from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import PhaseCost
from tests.report.runs import PROPOSED, UNIFORM, RunWriter


@pytest.fixture
def baseline(tmp_path: Path) -> RunDir:
    """A finished run on the uniform mixture."""
    writer = RunWriter(tmp_path / "uniform", policy="static").mixture(0, UNIFORM, "mixture.initial: uniform")
    writer.training().evaluation(50, [4.0, 2.0, 4.2]).evaluation(100, [3.5, 1.5, 4.0])
    writer.summary(
        [3.5, 1.5, 4.0], {"train": PhaseCost(seconds=10, device_seconds=20, flops=6e12, tokens=100_000)}
    )
    return writer.run


@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    """A finished run with one search."""
    writer = RunWriter(tmp_path / "opmix").mixture(0, UNIFORM, "mixture.initial: uniform")
    writer.search()
    writer.mixture(20, PROPOSED, "search 0001: simulated mean loss 0.0180 below staying", search="0001")
    writer.training().evaluation(50, [4.0, 1.8, 4.1]).evaluation(100, [3.52, 1.3, 3.9])
    train = PhaseCost(seconds=11, device_seconds=22, flops=6e12, tokens=100_000, possible_flops=24e12)
    writer.summary([3.52, 1.3, 3.9], {"train": train})
    return writer.run
