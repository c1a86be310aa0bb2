"""How long something may still take, from how fast it has gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

WINDOW_S = 600.0


class Pace:
    """Progress that was seen over time, of one thing at a time.

    Another thing, or one that went back (a restarted search), begins anew. Only the last ``WINDOW_S``
    count: what slowed down is not promised its old speed.
    """

    def __init__(self) -> None:
        self._what: Hashable = None
        self._seen: deque[tuple[float, float]] = deque()

    def see(self, what: Hashable, done: float, at: float) -> None:
        """``done`` units of ``what`` were done at the time ``at``, seconds."""
        if what != self._what or (self._seen and done < self._seen[-1][1]):
            self._what = what
            self._seen.clear()
        self._seen.append((at, done))
        while len(self._seen) > 2 and at - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """Units a second; None until two looks have seen progress between them."""
        if not self._seen:
            return None
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None


def seconds_left(done: float, total: float, per_second: float | None) -> float | None:
    """None where it is not known."""
    return (total - done) / per_second if per_second and total > done else None
