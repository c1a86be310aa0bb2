"""Fetching shards ahead of their use, in a process of its own that takes nothing from training's interpreter.

The loader writes what it will need as JSON lines to the process's standard input: first a store and the
splits' folders, then, each time it changes, the list of (split, shard) in the order of need. The files in the
cache are the result. The process ends with its input, or with its parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.store import ShardStore, one_line
from opmix_dist.errors import UserError
from opmix_dist.process import die_with_parent

log = logging.getLogger(__name__)

MAX_STARTS = 3
PAUSE_AFTER_FAILURE_S = 30.0
IDLE_S = 0.5
# Linux's default for who is not root; the folders of 2,000 domains take an eighth of it
PIPE_BYTES = 1 << 20


class Fetcher:
    """The loader's end of the process, which is started with the first wish and again when it has died.

    Nothing here waits: while the process is busy, or stopped, the newest wish replaces the one before it.

    Args:
        splits: by the index that wishes use; all of one store.
        threads: shards that are fetched at the same time.
    """

    def __init__(self, splits: Sequence[ShardedSplit], *, threads: int) -> None:
        store = splits[0].store
        assert store is not None
        self._hello = {"store": store.to_json(), "folders": [s.folder for s in splits], "threads": threads}
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._writing, self._next = b"", b""  # rest of the message under way, and the one after it

    def want(self, shards: list[tuple[int, int]]) -> None:
        """Replace what is to be fetched. Never raises: without it, shards are fetched when they are read."""
        try:
            if self._process is None and not self._start():
                return
            self._next = _line(shards)
            self._write()
        except OSError:
            self._end()
            if self._starts < MAX_STARTS:
                log.warning("the process that fetches shards ahead has died: starting another")
            else:
                log.warning("the process that fetches shards ahead died again: going on without it")

    def close(self) -> None:
        """End the process; a later wish starts it again."""
        self._end()
        self._starts = 0

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def _start(self) -> bool:
        if self._starts == MAX_STARTS:
            return False
        self._starts += 1
        command = [sys.executable, "-m", "opmix_dist.data.fetcher"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        with contextlib.suppress(OSError):  # a smaller pipe does, it takes longer to start
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._writing = _line(self._hello)
        return True

    def _write(self) -> None:
        """Write as much as the pipe takes now; the rest goes with the next wish."""
        assert self._process is not None
        assert self._process.stdin is not None
        while self._writing or self._next:
            if not self._writing:
                self._writing, self._next = self._next, b""
            try:
                written = os.write(self._process.stdin.fileno(), self._writing)
            except BlockingIOError:
                return
            self._writing = self._writing[written:]


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class _Wishes:
    """What is to be fetched next; shared by the threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: list[tuple[int, int]] = []
        self._busy: set[tuple[int, int]] = set()
        self._not_before: dict[tuple[int, int], float] = {}

    def replace(self, wanted: list[tuple[int, int]]) -> None:
        with self._changed:
            self._wanted = wanted
            self._changed.notify_all()

    def take(self, splits: Sequence[ShardedSplit]) -> tuple[int, int]:
        """Wait for the first wanted shard that is neither here nor being fetched nor failed a moment ago."""
        with self._changed:
            while True:
                now = time.monotonic()
                for pair in self._wanted:
                    if pair in self._busy or self._not_before.get(pair, 0.0) > now:
                        continue
                    if not splits[pair[0]].is_here(pair[1]):
                        self._busy.add(pair)
                        return pair
                self._changed.wait(IDLE_S)

    def done(self, pair: tuple[int, int], *, failed: bool) -> None:
        with self._changed:
            self._busy.discard(pair)
            if failed:
                self._not_before[pair] = time.monotonic() + PAUSE_AFTER_FAILURE_S


def serve(lines: IO[str]) -> None:
    """Read wishes until the input ends."""
    hello = json.loads(lines.readline())
    store = ShardStore.from_json(hello["store"])
    splits = [ShardedSplit(store.cache / folder, store) for folder in hello["folders"]]
    wishes = _Wishes()
    for _ in range(hello["threads"]):
        threading.Thread(target=_work, args=(store, splits, wishes), daemon=True).start()
    for line in lines:
        wanted = _that_fit(splits, store.limit_bytes, [(split, shard) for split, shard in json.loads(line)])
        # nothing that is needed soon gives way to what is fetched, what is needed first least of all
        for split, shard in reversed(wanted):
            store.touch(splits[split].local / splits[split].files[shard].raw_name)
        wishes.replace(wanted)


def _that_fit(
    splits: Sequence[ShardedSplit], limit_bytes: int | None, wanted: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The first of ``wanted`` that the cache holds together; with more, they would push each other out."""
    if limit_bytes is None:
        return wanted
    ends = itertools.accumulate(splits[split].files[shard].raw_bytes for split, shard in wanted)
    return wanted[: sum(1 for _ in itertools.takewhile(lambda end: end <= limit_bytes, ends))]


def _work(store: ShardStore, splits: Sequence[ShardedSplit], wishes: _Wishes) -> None:
    while True:
        pair = wishes.take(splits)
        failed = False
        try:
            store.fetch(splits[pair[0]].folder, splits[pair[0]].files[pair[1]])
        except UserError as error:  # whoever reads the shard meets it too, and stops
            log.warning("%s", error)
            failed = True
        except Exception as error:  # else each unforeseen one would end a thread, unseen
            log.warning("shard %d of %s: %s", pair[1], splits[pair[0]].local, one_line(error))
            failed = True
        finally:
            wishes.done(pair, failed=failed)


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the loader's, which ends this process
    logging.basicConfig(format="fetcher: %(message)s")
    serve(sys.stdin)
    os._exit(0)  # threads that fetch for nobody any more
