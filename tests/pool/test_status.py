"""What a search tells of its progress."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from opmix_dist.exchange.rundir import SearchDir
from opmix_dist.exchange.schemas import SearchStage
from opmix_dist.pool.status import StatusWriter


def test_the_time_that_is_left_goes_by_the_stage_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter took 40 s: three more take 120 s; three quarters took 75 s: the last takes 25 s."""
    now = 1000.0
    monkeypatch.setattr("opmix_dist.pool.status.time.monotonic", lambda: now)
    status = StatusWriter(SearchDir(tmp_path / "0001"), writes=True)
    with caplog.at_level(logging.INFO):
        status.enter(SearchStage.EVALUATING, total=400)
        now += 40
        status.add(100)
        now += 20
        status.add(200)
        now += 15
        status.add(0)
        status.enter(SearchStage.FITTING)
    assert [record.message for record in caplog.records] == [
        "search 0001: evaluating 0/400",
        "search 0001: evaluating 100/400, 2 min left",
        "search 0001: evaluating 300/400, 25 s left",
        "search 0001: fitting",
    ]
