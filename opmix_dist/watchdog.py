"""Where each rank of a role stands, so that ranks which lose each other can say who is missing, and where.

A thread of each rank tells its place to the launch's store every few seconds. When a collective fails, or
when this rank has not moved for most of the time that a collective may take, one rank reads all places and
logs them: the ranks that are behind the others first. NCCL ends a process from another thread when a
collective is over its time, so nothing could be said after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed import DistError, Store

log = logging.getLogger(__name__)
BEAT_S = 2.0
PATIENCE = 0.8
"""Share of a collective's time without a move after which the places are told."""
_SHOWN_RANKS = 8
_COLLECTIVE_WORDS = ("gloo", "nccl", "timed out", "connection closed", "connection reset", "process group")


class Place(BaseModel):
    """What a rank last told of itself."""

    model_config = ConfigDict(extra="forbid")

    phase: str
    step: int
    moves: int
    """Phases and collectives that it has entered: the same ones in the same order on all ranks."""
    beat: int


class Watchdog:
    """Of one rank. ``enter`` and ``move`` cost an assignment each.

    Args:
        role: for messages.
        store: of this role's own; the thread talks to it, so nobody else may wait in the same client.
        timeout_s: after which a collective raises.
    """

    def __init__(self, role: str, rank: int, size: int, store: Store, timeout_s: float) -> None:
        self._role, self._rank, self._size = role, rank, size
        self._store, self._timeout_s = store, timeout_s
        self._phase, self._step, self._moves, self._moved_at = "start", 0, 0, time.monotonic()
        self._beat = 0
        self._interval_s = min(BEAT_S, timeout_s / 8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """A part of the work begins; all ranks of the role enter the same ones."""
        self._phase, self._step = phase, step
        self.move()

    def move(self) -> None:
        """This rank comes to a collective."""
        self._moves += 1
        self._moved_at = time.monotonic()

    def close(self) -> None:
        self._ended.set()

    def explain(self, error: BaseException) -> None:
        """If ``error`` is that of a collective, log where all ranks stand; on the first rank that asks."""
        if is_collective_failure(error):
            self._tell(f"a collective failed on {self._role} rank {self._rank} ({_short(error)})")

    def _watch(self) -> None:
        told_at = -1
        while True:
            still = time.monotonic() - self._moved_at
            try:
                self._publish()
                if still > PATIENCE * self._timeout_s and told_at != self._moves:
                    told_at = self._moves
                    self._tell(f"{self._role} rank {self._rank} has not moved for {still:.0f} s")
            except (DistError, RuntimeError) as error:  # the launch is ending, or the network is gone
                log.debug("cannot tell this rank's place: %s", error)
            if self._ended.wait(self._interval_s):
                return

    def _publish(self) -> None:
        self._beat += 1
        place = Place(phase=self._phase, step=self._step, moves=self._moves, beat=self._beat)
        self._store.set(str(self._rank), place.model_dump_json())

    def _tell(self, what: str) -> None:
        try:
            if self._store.add(f"told/{self._moves}", 1) > 1:
                return  # another rank does, at the same place
            before = self._places()
            for _ in range(3):  # longer than the others' beats are apart, and this rank must not seem gone
                time.sleep(self._interval_s)
                self._publish()
            after = self._places()
        except (DistError, RuntimeError) as error:
            log.error("%s; where the others stand cannot be asked: %s", what, _short(error))
            return
        log.error("%s; %s", what, describe(before, after))

    def _places(self) -> list[Place | None]:
        """Of all ranks; None of one that has told none."""
        return [self._place(rank) for rank in range(self._size)]

    def _place(self, rank: int) -> Place | None:
        if not self._store.check([str(rank)]):
            return None
        try:
            return Place.model_validate_json(self._store.get(str(rank)))
        except ValidationError:
            return None


def is_collective_failure(error: BaseException) -> bool:
    """Whether it says that other ranks did not answer; gloo has no exception of its own."""
    if isinstance(error, DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(words in text for words in _COLLECTIVE_WORDS)


def describe(before: Sequence[Place | None], after: Sequence[Place | None]) -> str:
    """In words, the ranks that are furthest behind first.

    Args:
        before, after: places of the ranks [ranks], read some beats apart; one without a beat in between
            is gone.
    """
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        groups[_where(old, new)].append(rank)
    parts = [f"{_ranks(ranks)} {text}" for (_, text), ranks in sorted(groups.items())]
    return "; ".join(parts)


def _where(old: Place | None, new: Place | None) -> tuple[int, str]:
    """How far a rank has come, -1 for one that is gone, and the words for it."""
    if new is None:
        return -1, "never told a place"
    text = f"at step {new.step} ({new.phase})"
    if old is not None and old.beat == new.beat:
        return -1, f"without a sign of life, last {text}"
    return new.moves, f"{text}, {new.moves} moves"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
