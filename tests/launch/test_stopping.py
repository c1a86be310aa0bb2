"""Runs without a scheduler that are asked to stop: they save, say so, and go on where they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import SearchStage
from tests.helpers import ROOT
from tests.train.jobs import SEARCH_STEP, STEPS, curve, schedule, tiny_config

pytestmark = pytest.mark.launch


def ended(process: psutil.Process) -> bool:
    """Within a moment; whether its parent has looked or not."""
    for _ in range(50):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


class Command:
    """``opmix ...`` in a process of its own."""

    def __init__(self, run: RunDir, *arguments: str) -> None:
        self.run = run
        self.log = open(run.path.with_suffix(".log"), "a+")  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opmix_dist.cli", *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()  # its ranks die with it
                pytest.fail(f"ended before, or not in time: {what}\n{self.said()}")
            time.sleep(0.02)

    def finish(self, timeout_s: float = 120.0) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()  # its ranks die with it

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-6000:]

    def below(self, words: str) -> list[psutil.Process]:
        """Processes that it started, by their command lines."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in found if words in " ".join(process.cmdline())]


def written(config: dict[str, Any]) -> str:
    file = Path(config["run_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return str(file)


def steps(run: RunDir) -> int:
    return max((line.step for line in run.train_lines()), default=0)


def test_a_launch_is_stopped_by_the_keyboard_and_by_a_signal_to_one_rank(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Two trainers and a pool rank: first while the trainers wait for the search, then between two steps."""
    config = tiny_config(tiny_data, tmp_path / "run", train={"steps": 2000, "eval_interval_steps": 0})
    config["search"]["start_fraction"] = SEARCH_STEP / 2000
    run = RunDir(tmp_path / "run")
    launch = Command(run, "launch", "local", written(config), "--ranks", "3")
    launch.wait_for(lambda: run.search("0001").status_file.exists(), "a search")
    workers = launch.below("opmix_dist.pool.worker")
    assert len(workers) == 1
    for _ in range(3):  # impatient
        launch.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert launch.finish() == 130, launch.said()
    stopped = run.stopped()
    assert (stopped.signal, stopped.step, stopped.checkpoint) == ("SIGINT", SEARCH_STEP, SEARCH_STEP)
    assert ended(workers[0]), "the pool has not ended with the trainers"
    assert "Traceback" not in launch.said()

    again = Command(run, "resume", str(run.path))
    again.wait_for(lambda: steps(run) > SEARCH_STEP + 2, "steps after the search")
    assert run.stopped() is None, "it goes on"
    ranks = [process for process in again.below("opmix_dist.cli train") if _rank(process) == "1"]
    ranks[0].send_signal(signal.SIGUSR1)
    assert again.finish() == 128 + signal.SIGUSR1, again.said()
    stopped = run.stopped()
    assert (stopped.signal, stopped.checkpoint) == ("SIGUSR1", stopped.step)
    assert steps(run) == stopped.step < 2000
    assert f"stopped by SIGUSR1 after step {stopped.step}" in again.said()


def _rank(process: psutil.Process) -> str | None:
    return process.environ().get("RANK") if "torch.distributed.run" not in process.cmdline() else None


def test_a_search_on_the_trainers_own_ranks_is_left_and_taken_up_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    """One process: stopped in the search and resumed, it ends as one that was left alone."""
    for name in ("run", "whole"):
        config = tiny_config(tiny_data, tmp_path / name, pool={"ranks": 0}, checkpoint={"interval_steps": 0})
        config["search"]["probes"]["steps"] = 60
        written(config)
    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
    undisturbed = Command(whole, "train", str(tmp_path / "whole.yaml"))
    job = Command(run, "train", str(tmp_path / "run.yaml"))
    job.wait_for(lambda: run.search("0001").status_file.exists(), "a search")
    job.process.send_signal(signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 128 + signal.SIGTERM, job.said()
    assert run.stopped().checkpoint == SEARCH_STEP
    assert run.search("0001").status().stage is not SearchStage.FAILED
    resumed = Command(run, "train", str(tmp_path / "run.yaml"))
    assert resumed.finish() == 0, resumed.said()
    assert undisturbed.finish() == 0, undisturbed.said()
    assert run.summary().steps == STEPS
    assert schedule(run) == schedule(whole)
    assert curve(run) == curve(whole)
