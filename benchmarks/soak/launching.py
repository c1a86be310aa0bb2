"""Starting a job with a plan of faults again and again, until it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak.drawing import Episode, Outside
from opmix_dist.faults.points import PLAN_VARIABLE

ROOT = Path(__file__).parent.parent.parent
POLL_S = 0.05
QUIET_S = 150.0
"""Without a line in the log or the run, a launch counts as hung, and is killed."""
_READY = re.compile(r"from step (\d+) to \d+")


@dataclass
class Start:
    """One launch of an episode."""

    code: int = 0
    seconds: float = 0.0
    ready_seconds: float | None = None
    """Until it trained, or went on with it."""
    first_step: int | None = None
    last_step: int = 0
    """Steps in its log when it ended."""
    fired: list[str] = field(default_factory=list)
    """Faults in it, in order."""
    killed_as_hung: bool = False


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", "opmix_dist.cli", *arguments]


def prepare(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "opmix_dist.cli", "prepare", *arguments]


class Launches:
    """
    Args:
        folder: of this episode: plan, marks, logs.
        steps_file: metrics/train.jsonl of the run, which tells how far it is.
    """

    def __init__(self, folder: Path, command: Sequence[str], episode: Episode, steps_file: Path) -> None:
        self.folder, self.command, self.episode, self.steps_file = folder, command, episode, steps_file
        self.marks = folder / "fired"
        self.marks.mkdir(parents=True, exist_ok=True)
        plan = {"fired": str(self.marks), "faults": [fault.model_dump() for fault in episode.faults]}
        (folder / "plan.json").write_text(json.dumps(plan))

    def run_to_end(self, most: int) -> list[Start]:
        """All launches, of which the last has ended well unless there were ``most``."""
        starts: list[Start] = []
        while len(starts) < most and (not starts or starts[-1].code != 0):
            starts.append(self._launch(len(starts)))
        return starts

    def _launch(self, number: int) -> Start:
        known, start, began = set(self.fired()), Start(), time.monotonic()
        log = self.folder / f"launch_{number}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", PLAN_VARIABLE: str(self.folder / "plan.json")},
                start_new_session=True,
            )
        try:
            start.code = self._watch(process, log, start, began)
        finally:
            self._kill_all(process)
        start.seconds = time.monotonic() - began
        start.last_step = self._steps()
        start.fired = sorted(set(self.fired()) - known, key=lambda name: self.fired()[name])
        return start

    def _watch(self, process: subprocess.Popen[bytes], log: Path, start: Start, began: float) -> int:
        size, since = -1, time.monotonic()
        while (code := process.poll()) is None:
            now = time.monotonic()
            seen = log.stat().st_size + (self.steps_file.stat().st_size if self.steps_file.exists() else 0)
            if seen != size:
                size, since = seen, now
                ready = _READY.search(log.read_text(errors="replace"))
                if ready and start.ready_seconds is None:
                    start.ready_seconds, start.first_step = now - began, int(ready[1])
            if now - since > QUIET_S:
                start.killed_as_hung = True
                return -signal.SIGKILL
            self._strike(process)
            time.sleep(POLL_S)
        return code

    def _strike(self, process: subprocess.Popen[bytes]) -> None:
        """Carry out what is due from outside."""
        for fault in self.episode.outside:
            mark = self.marks / f"{fault.id}.json"
            if mark.exists() or self._steps() < fault.step:
                continue
            if (victim := _find(process.pid, fault)) is not None:
                mark.write_text(json.dumps({"id": fault.id, "pid": victim.pid, "time": time.time()}))
                victim.kill()

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        """Ranks die with their launcher; the pool's workers with their supervisors."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _steps(self) -> int:
        try:
            lines = self.steps_file.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def fired(self) -> dict[str, float]:
        """When each fault happened, by its id."""
        found: dict[str, Any] = {}
        for mark in self.marks.glob("*.json"):
            with contextlib.suppress(ValueError):  # it is being written
                found[mark.stem] = json.loads(mark.read_text())["time"]
        return found


def _find(launcher: int, fault: Outside) -> psutil.Process | None:
    """A process of the kind, or None while there is none."""
    try:
        parent = psutil.Process(launcher)
        if fault.victim == "launcher":
            return parent
        for child in parent.children(recursive=True):
            line = " ".join(child.cmdline())
            is_worker = "opmix_dist.pool.worker" in line
            if fault.victim == "pool worker" and is_worker:
                return child
            if fault.victim == "trainer" and "opmix_dist.cli" in line and child.environ().get("RANK") == "0":
                return child
    except psutil.Error:  # it has ended meanwhile
        return None
    return None
