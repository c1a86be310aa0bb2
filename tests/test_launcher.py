"""A rank that fails ends its launch, whatever the others do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher import Launch


@pytest.mark.launch
def test_a_rank_that_fails_ends_the_others_and_is_told(tmp_path: Path) -> None:
    launch = Launch(2, "tests.test_launcher", [], tmp_path / "log")
    assert launch.wait(60) == 1
    log = (tmp_path / "log").read_text()
    assert "RuntimeError: rank 1 of 2 fails" in log
    waiting = int(log.partition("rank 0 waits as ")[2].split()[0])
    assert not psutil.pid_exists(waiting)
    with pytest.raises(TimeoutError):
        Launch(1, "tests.test_launcher", [], tmp_path / "alone").wait(2.0)


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        print(f"rank 0 waits as {os.getpid()}")
        time.sleep(600)
    time.sleep(1)
    raise RuntimeError(f"rank 1 of {os.environ['WORLD_SIZE']} fails")
