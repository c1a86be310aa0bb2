"""Carries a plan of faults out in one process.

Before a fault happens its mark is on the disk. The mark proves that it happened, and whoever makes it first
owns the fault: no other rank, and no later start of the job, has it again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from opmix_dist.faults.plan import Fault, read_plan

log = logging.getLogger(__name__)
EXIT_CODE = 7


class InjectedError(RuntimeError):
    """An exception that nobody foresaw, on purpose."""


class Injector:
    """
    Args:
        faults: those of this process's role and rank.
        marks: folder of the marks.
    """

    def __init__(self, faults: Sequence[Fault], marks: Path) -> None:
        self._faults, self._marks = list(faults), marks

    @classmethod
    def open(cls, path: str, role: str, rank: int) -> Injector:
        """Raises UserError as of :func:`read_plan`."""
        plan = read_plan(Path(path))
        return cls([f for f in plan.faults if (f.role, f.rank) == (role, rank)], Path(plan.fired))

    def reach(self, name: str, step: int, detail: str) -> None:
        """A point is passed: carry out what is due here.

        Raises:
            InjectedError, OSError: as planned.
        """
        for fault in self._due(name, step):
            if fault.detail in ("", detail) and self._claim(fault, step, detail):
                _happen(fault)

    def spoils(self, name: str, step: int) -> bool:
        """Whether the number at this point is to be spoiled now."""
        return any(self._claim(fault, step, "") for fault in self._due(name, step))

    def _due(self, name: str, step: int) -> list[Fault]:
        return [fault for fault in self._faults if fault.point == name and step >= fault.step]

    def _claim(self, fault: Fault, step: int, detail: str) -> bool:
        """Make the fault's mark; false when it was there."""
        self._faults.remove(fault)
        self._marks.mkdir(parents=True, exist_ok=True)
        try:
            mark = os.open(self._marks / f"{fault.id}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        text = {"id": fault.id, "step": step, "detail": detail, "pid": os.getpid(), "time": time.time()}
        os.write(mark, json.dumps(text).encode())
        os.fsync(mark)
        os.close(mark)
        _sync_folder(self._marks)
        log.warning("fault %s: %s at %s, step %d %s", fault.id, fault.kind, fault.point, step, detail)
        return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _happen(fault: Fault) -> None:
    if fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "exit":
        os._exit(EXIT_CODE)
    elif fault.kind == "exception":
        raise InjectedError(f"injected at {fault.point}")
    elif fault.kind == "oserror":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {fault.point})")
    elif fault.kind == "slow":
        time.sleep(fault.seconds)
    while fault.kind == "hang":
        time.sleep(3600.0)
