"""A rank that hangs ends itself, so that whatever started it can start it again.

Ranks that wait for another one are freed by their collective's timeout. Nobody waits for a rank that trains
alone, and a thread that writes a snapshot or a checkpoint is waited for by all ranks in step. So a thread of
each rank looks at how long the rank has been at one place, and at what it does beside.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: another attempt may succeed."""
LONG = 4.0
"""Times the limit that a place may take which is long by nature, or which is come to for the first time, when
blocks are compiled and files come from afar."""
SHORT_PHASES = ("reading data", "training")
"""Where a rank is at each step; every other phase is long."""
_BEAT_S = 1.0
_STDERR = 2
_TELLING_S = 10.0


@dataclass
class _Place:
    """``since``: by the guard's clock, when it was come to or last showed progress."""

    what: str
    limit_s: float
    since: float


class HangGuard:
    """Of one rank. ``enter`` and ``move`` cost an assignment each.

    Its clock is of the time that this process runs: what a scheduler suspends has not hung.

    Args:
        role, rank: for messages and the file's name.
        limit_s: at one place, times ``LONG`` at a long one.
        folder: where the stacks are written besides standard error.
        end: ends the process.
    """

    def __init__(
        self, role: str, rank: int, limit_s: float, folder: Path, *, end: Callable[[int], object] = os._exit
    ) -> None:
        self._who, self._name = f"{role} rank {rank}", f"{role}_{rank}"
        self._limit_s, self._folder, self._end = limit_s, folder, end
        self._clock = 0.0
        self._known: set[str] = set()
        self._beside: dict[object, _Place] = {}
        self._place = self._come_to("start", 0)
        self._beat_s = min(_BEAT_S, limit_s / 8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang guard", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """A part of the work begins in the main thread."""
        self._place = self._come_to(phase, step)

    def move(self) -> None:
        """Progress at the same place: a collective, a piece of a search."""
        self._place.since = self._clock

    def beside(self, what: str) -> Callable[[], object]:
        """Something long begins in another thread. What is returned is to be called when it has ended."""
        key = object()
        self._beside[key] = _Place(what, LONG * self._limit_s, self._clock)
        return partial(self._beside.pop, key, None)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _come_to(self, phase: str, step: int) -> _Place:
        long = phase not in SHORT_PHASES or phase not in self._known
        self._known.add(phase)
        return _Place(f"step {step} ({phase})", self._limit_s * (LONG if long else 1.0), self._clock)

    def _watch(self) -> None:
        at = time.monotonic()
        while not self._ended.wait(self._beat_s):
            # where C code keeps the interpreter's lock, this thread hangs too; that one is none of Python's
            faulthandler.dump_traceback_later(LONG * self._limit_s, exit=True, file=_STDERR)
            before, at = at, time.monotonic()
            self._clock += min(at - before, 2 * self._beat_s)
            # what is beside comes first: the main thread may wait for it since the same beat of the clock
            for place in (*list(self._beside.values()), self._place):
                if self._clock - place.since > place.limit_s:
                    return self._give_up(place)

    def _give_up(self, place: _Place) -> None:
        """Nothing here may wait for good: neither a pipe that nobody reads nor a file system that is gone."""
        head = (
            f"opmix: {self._who} hangs: {place.what} without progress for {place.limit_s:g} s "
            f"(train.hang_timeout_s is {self._limit_s:g}). The process ends with status {EXIT_STATUS}; "
            "started again, the run goes on from its newest checkpoint. Stacks of all threads:\n"
        )
        tellers = [
            threading.Thread(target=tell, args=(head,), daemon=True) for tell in (_print_stacks, self._keep)
        ]
        for teller in tellers:
            teller.start()
        for teller in tellers:
            teller.join(_TELLING_S)
        self._end(EXIT_STATUS)

    def _keep(self, head: str) -> None:
        at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = self._folder / f"{self._name}_{at}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                _write_stacks(file.fileno(), head)
                os.fsync(file.fileno())
        except OSError as error:
            os.write(_STDERR, f"opmix: {path} cannot be written: {error}\n".encode())


def _print_stacks(head: str) -> None:
    _write_stacks(_STDERR, head)


def _write_stacks(file: int, head: str) -> None:
    os.write(file, head.encode())
    faulthandler.dump_traceback(file, all_threads=True)
