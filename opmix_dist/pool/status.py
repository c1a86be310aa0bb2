"""status.json of a search: the pool's stage and sign of life."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import SearchDir, write_record
from opmix_dist.exchange.schemas import SearchStage, SearchStatus
from opmix_dist.faults.points import point

log = logging.getLogger(__name__)
WRITE_INTERVAL_S = 0.5  # often enough for a person who watches, rare enough for a shared file system
LOG_INTERVAL_S = 30.0
FINAL_ATTEMPTS = 4


def _beats_before(search: SearchDir) -> int:
    """Of an earlier worker: its successor's first word must differ from its last, or passes for silence."""
    try:
        status = search.status()
    except (UserError, OSError) as error:
        log.warning("the status of search %s is written anew: %s", search.name, error)
        return 0
    return 0 if status is None else status.beat + 1


class StatusWriter:
    """Written by the pool's leader only; the other ranks call it too and write nothing.

    Args:
        on_beat: called after each piece of work; may raise.
    """

    def __init__(
        self, search: SearchDir, *, writes: bool, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        self._search, self._writes, self._on_beat = search, writes, on_beat
        self._beat = _beats_before(search) if writes else 0
        self._last_write = self._last_log = 0.0

    def enter(self, stage: SearchStage, *, total: int = 0, reason: str = "") -> None:
        """Move to a stage; written and logged at once."""
        self._stage, self._total, self._done = stage, total, 0
        self._entered = time.monotonic()
        if stage is not SearchStage.FAILED:
            point(f"search.{stage}")
        self._write(reason)
        self._log()

    def add(self, more: int) -> None:
        """So many more of the stage's pieces of work are done."""
        self.advance(self._done + more)

    def advance(self, done: int) -> None:
        """So many of the stage's pieces of work are done; written at most every half second."""
        self._beat += 1
        self._done = done
        point(f"search.{self._stage}", step=done)
        now = time.monotonic()
        if now - self._last_write >= WRITE_INTERVAL_S:
            self._write()
        if now - self._last_log >= LOG_INTERVAL_S:
            self._log()
        self._on_beat()

    def _log(self) -> None:
        if self._writes:
            self._last_log = time.monotonic()
            count = f" {self._done}/{self._total}" if self._total else ""
            log.info("search %s: %s%s%s", self._search.name, self._stage, count, self._left())

    def _left(self) -> str:
        """How long the stage may still take, in words, from how long it took so far."""
        if not 0 < self._done < self._total:
            return ""
        seconds = (time.monotonic() - self._entered) * (self._total - self._done) / self._done
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"

    def _write(self, reason: str = "") -> None:
        """A beat that cannot be written is no reason to end a search; the last word is tried again."""
        if not self._writes:
            return
        self._last_write = time.monotonic()
        status = SearchStatus(
            stage=self._stage, done=self._done, total=self._total, beat=self._beat, reason=reason
        )
        for attempt in range(FINAL_ATTEMPTS if self._stage.final else 1):
            try:
                return write_record(self._search.status_file, status)
            except OSError as error:
                log.warning("cannot write %s: %s", self._search.status_file, error)
                time.sleep(attempt)
