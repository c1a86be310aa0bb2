"""A worker whose supervisor is gone."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_a_worker_whose_supervisor_died_while_it_started_ends() -> None:
    """Else it would go on in the run directory beside the pool of the restarted job."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    worker = [sys.executable, "-m", "opmix_dist.pool.worker", "0", "1", str(gone.pid)]
    ended = subprocess.run(worker, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
