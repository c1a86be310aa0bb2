"""The processes that parse and tokenise: one pool for all stages and all domains of an ingest.

Workers are forked from a server process that has imported what they need and does nothing else: a fork of the
caller, which may have run threads, may hang, and a process of its own for each worker imports for seconds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from types import TracebackType
from typing import Any, Generic, TypeVar

from opmix_dist.errors import UserError

TASKS_PER_WORKER = 3  # chunks in flight: keeps workers busy and bounds memory

PRELOAD = "opmix_dist.data.preload"

K = TypeVar("K")
R = TypeVar("R")


@dataclass(frozen=True)
class Task(Generic[K, R]):
    """A call for a worker, and what the caller knows it by."""

    key: K
    function: Callable[..., R]
    arguments: tuple[Any, ...]


class FileFault(Exception):
    """What is wrong with a document, to follow its file's name, which a worker does not know."""

    def __init__(self, file: int, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason


class Pool:
    """``workers`` processes; use it as a context manager, which stops them at the end.

    Args:
        workers: number of processes; the results do not depend on it.
        setup: called in each process before all else, with ``arguments``; picklable.
    """

    def __init__(self, workers: int, setup: Callable[..., None] | None = None, *arguments: Any) -> None:
        self.workers = workers
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()  # imports while the caller gets its first task ready
        self._executor = ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_start,
            initargs=(setup, arguments),
        )

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Start one task; :meth:`result` waits for it."""
        try:
            return self._executor.submit(function, *arguments)
        except BrokenProcessPool:
            raise _killed() from None

    def result(self, future: Future[R]) -> R:
        """What the task returns or raises; UserError when its process died, most often for want of memory."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise _killed() from None

    def stream(self, groups: Sequence[Iterable[Task[K, R]]]) -> Iterator[Iterator[tuple[K, R]]]:
        """For each group in order, the keys and results of its tasks in order.

        At most ``TASKS_PER_WORKER`` tasks per worker are read ahead, across the groups' borders, so that
        many small groups keep all workers busy. Each group is to be used up before the next is taken.
        """
        pending: deque[tuple[K, Future[R]] | None] = deque()  # None: a group ends here
        feed = self._feed(groups)

        def results() -> Iterator[tuple[K, R]]:
            while True:
                pending.extend(itertools.islice(feed, TASKS_PER_WORKER * self.workers - len(pending)))
                if (started := pending.popleft()) is None:
                    return
                key, future = started
                yield key, self.result(future)

        return (results() for _ in groups)

    def _feed(self, groups: Sequence[Iterable[Task[K, R]]]) -> Iterator[tuple[K, Future[R]] | None]:
        for group in groups:
            for task in group:
                yield task.key, self.submit(task.function, *task.arguments)
            yield None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)


def _killed() -> UserError:
    return UserError("a worker process was killed: give it more memory or fewer --workers, and run again")


def _start(setup: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if setup is not None:
        setup(*arguments)


def _exit_with_parent() -> None:
    """A pool's idle worker never learns that its parent was killed, so it would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
