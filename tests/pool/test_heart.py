"""The pool's heartbeat: when workers count as hung. The clock is the test's."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from opmix_dist.pool import heart
from opmix_dist.pool.heart import PIPE_VARIABLE, Heart, Pulse


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``now`` in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(heart, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_worker_that_waits_for_another_is_not_silent_until_both_are(clock: SimpleNamespace) -> None:
    store = HashStore()
    mine, other = (Pulse(store, "beats", timeout_s=10.0) for _ in range(2))
    waiting, working = Heart(mine.writing), Heart(other.writing)
    waiting.beat()
    for _ in range(100):
        clock.now += 1.0
        working.beat()
        assert not other.silent()
        assert not mine.silent()
    clock.now += 10.0
    assert not mine.silent()
    clock.now += 0.1
    assert mine.silent()
    assert other.silent()
    waiting.beat()
    assert not mine.silent()
    assert not other.silent()
    for pulse in (mine, other):
        pulse.close()


def test_beats_never_wait_nor_fail(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full pipe, a closed one, and none."""
    pulse = Pulse(HashStore(), "beats", timeout_s=100.0)
    monkeypatch.setenv(PIPE_VARIABLE, str(pulse.writing))
    worker = Heart.of_environment()
    assert PIPE_VARIABLE not in os.environ, "children must not write into it"
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pulse.writing, b"." * 4096)
    worker.beat()
    assert not pulse.silent()
    pulse.close()
    clock.now += 1.0
    worker.beat()
    Heart(None).beat()
