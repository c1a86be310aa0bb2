"""How our processes live and die: with their parent, and one writer for each run directory."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from typing import IO, NoReturn

from opmix_dist.bounded import open_ordinary
from opmix_dist.errors import UserError

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent dies.

    A launcher that is killed with -9 cannot take its ranks along; orphans would go on writing into the run
    directory while the restarted job writes there too.

    Args:
        parent: its process number, where it has told it: it may have died while this process was starting.
    """
    if sys.platform != "linux":
        return
    if parent is None:
        parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def leave_stopping_to_parent(*_: object) -> None:
    """Ignore the signals that ask a run to stop.

    A scheduler sends them to every process of a job, a terminal to every process of its foreground group. A
    helper that died of one would take its parent's last batches or messages along, while that writes a
    checkpoint; the parent ends its helpers itself.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_process(code: int) -> NoReturn:
    """Leave without the interpreter's finalisation, after everything was closed and flushed.

    Threads of torch's process groups may still let go of Python objects while it goes on, which aborts the
    process ("terminate called without an active exception", seen once, under load) and
    makes the launcher fail a job that had ended well.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_lock(path: Path) -> IO[str]:
    """UserError where somebody has put something else in its place: what a link leads to would be emptied."""
    return open(open_ordinary(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "a+")


def lock_run(folder: Path) -> IO[str]:
    """Hold the run directory for this process; keep the returned file open as long.

    Raises:
        UserError: another live process holds it, or its ``.lock`` is no ordinary file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_lock(folder / ".lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder} is in use by another run ({file.read().strip()}): stop it first") from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): start one job on it only", folder, error)
    # a forked reader of the loader would hold the lock on after this process is killed
    os.register_at_fork(after_in_child=file.close)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
