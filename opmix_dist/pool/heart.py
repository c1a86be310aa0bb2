"""A worker's heartbeat: bytes through a pipe to its supervisor, and the pool's beats in the launch's store.

A rank of a pool may wait for the others for hours, silently and rightly. So silence counts for the pool as a
whole: when no worker has done a piece of work for too long, they wait for one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import time

from torch.distributed import Store

PIPE_VARIABLE = "OPMIX_HEARTBEAT_FD"
_INTERVAL_S = 0.2


class Heart:
    """In the worker. ``beat`` never waits and never fails, also where no supervisor reads."""

    def __init__(self, pipe: int | None) -> None:
        self._pipe, self._last = pipe, 0.0
        if pipe is not None:
            os.set_blocking(pipe, False)

    @classmethod
    def of_environment(cls) -> Heart:
        """The supervisor's pipe, if one has started this process."""
        pipe = os.environ.pop(PIPE_VARIABLE, None)
        return cls(None if pipe is None else int(pipe))

    def beat(self) -> None:
        now = time.monotonic()
        if self._pipe is None or now - self._last < _INTERVAL_S:
            return
        self._last = now
        with contextlib.suppress(OSError):
            os.write(self._pipe, b".")


class Pulse:
    """In the supervisor, of the whole pool through its own worker's pipe and the store.

    Args:
        key: of the count of beats, of one generation of workers.
    """

    def __init__(self, store: Store, key: str, timeout_s: float) -> None:
        self._store, self._key, self._timeout_s = store, key, timeout_s
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self._seen, self._since = -1, time.monotonic()

    def silent(self) -> bool:
        """Whether no worker has done anything for too long; to be asked often."""
        beats = self._store.add(self._key, self._own_beats())
        now = time.monotonic()
        if beats != self._seen:
            self._seen, self._since = beats, now
        return now - self._since > self._timeout_s

    def _own_beats(self) -> int:
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self.reading, 1 << 16))
        return 0

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)
