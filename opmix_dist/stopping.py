"""Stopping on request: a signal asks a run to end at the next step boundary, with a checkpoint.

A scheduler that takes an allocation back sends SIGTERM, or SIGUSR1 some time before; Ctrl-C is SIGINT. They
may reach one rank only, and between any two lines of Python, so a handler does no more than note the signal.
All trainer ranks ask each other at step boundaries (:meth:`StopSignals.agreed`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import Store

from opmix_dist.distributed import World, launch_attempt, launch_store

_KEY = "opmix/stopped"
_HELD = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """The run ends here because somebody asked for it; raised on all trainer ranks at the same boundary."""


class StopSignals:
    """The signals that this process got. A second one, as schedulers and launchers send, changes nothing."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the last signal; 0: none."""

    def listen(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on; in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        take_held_signals()

    @contextmanager
    def listening_to_keyboard(self) -> Iterator[None]:
        """Note SIGINT too. Outside, where there is nothing to save, Ctrl-C ends the process at once."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, world: World) -> int:
        """Collective over the trainer ranks. The signal that any of them has received, or 0."""
        return world.largest(self.received)

    def stop_if_agreed(self, world: World) -> None:
        """Collective over the trainer ranks.

        Raises:
            StopRequested: on all of them, when any has received a signal.
        """
        if self.agreed(world):
            raise StopRequested


@contextmanager
def holding_signals() -> Iterator[None]:
    """Signals that arrive inside wait, also in processes that are started here: until they listen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_held_signals() -> None:
    """This process listens now: what its parent has held back, or holds back for it, may arrive."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def tell_launch() -> None:
    """On the trainers' leader: the pool ranks of this launch may end, as the trainers do."""
    launch_store().set(_key(), "1")


def launch_is_told(store: Store) -> bool:
    """Whether the trainers of this launch were stopped on request."""
    return store.check([_key()])


def _key() -> str:
    return f"{_KEY}/{launch_attempt()}"


def name_of(number: int) -> str:
    """``SIGTERM`` of 15."""
    return signal.Signals(number).name
