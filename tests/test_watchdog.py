"""What is said of ranks that lose each other."""

from __future__ import annotations

import logging
import time

import pytest
from torch.distributed import DistError, HashStore

from opmix_dist import watchdog
from opmix_dist.watchdog import Place, Watchdog, describe, is_collective_failure


def place(moves: int, beat: int, phase: str = "training", step: int = 7) -> Place:
    return Place(phase=phase, step=step, moves=moves, beat=beat)


def test_the_ranks_that_are_behind_come_first_and_those_that_are_gone_before_them() -> None:
    before = [place(20, 1), place(18, 1, "reading data"), place(20, 1), place(19, 5), None]
    after = [place(20, 2), place(18, 2, "reading data"), place(20, 2), place(19, 5), None]
    assert describe(before, after) == (
        "rank 4 never told a place; "
        "rank 3 without a sign of life, last at step 7 (training); "
        "rank 1 at step 7 (reading data), 18 moves; "
        "ranks 0, 2 at step 7 (training), 20 moves"
    )


def test_of_many_ranks_the_first_are_named() -> None:
    ranks = [place(3, beat=rank) for rank in range(1000)]
    later = [place(3, beat=rank + 1) for rank in range(1000)]
    assert describe(ranks, later) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more at step 7 (training), 3 moves"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), True),
        (DistError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_which_errors_are_those_of_a_collective(error: Exception, expected: bool) -> None:
    assert is_collective_failure(error) == expected


def test_a_rank_that_does_not_move_is_told_of_once_for_each_place(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.3)
    store = HashStore()
    with caplog.at_level(logging.ERROR, "opmix_dist"):
        stuck = Watchdog("trainer", 0, 2, store, timeout_s=3.0)
        behind = Watchdog("trainer", 1, 2, store, timeout_s=1e6)
        behind.enter("reading data", 5)
        stuck.enter("reading data", 5)
        stuck.enter("training", 5)
        _wait(lambda: bool(caplog.records))
        time.sleep(1.0)
        assert len(caplog.records) == 1
        assert "trainer rank 0 has not moved for" in caplog.text
        assert "rank 1 at step 5 (reading data), 1 moves; rank 0 at step 5 (training), 2 moves" in caplog.text
        stuck.enter("evaluation", 6)
        _wait(lambda: len(caplog.records) == 2)
        assert "(evaluation)" in caplog.records[1].message
        stuck.close()
        behind.close()


def test_an_error_of_a_collective_is_explained_by_one_rank(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.3)
    store = HashStore()
    ranks = [Watchdog("pool", rank, 2, store, timeout_s=1e6) for rank in range(2)]
    _wait(lambda: all(store.check([str(rank)]) for rank in range(2)))
    with caplog.at_level(logging.ERROR, "opmix_dist"):
        for rank in ranks:
            rank.explain(RuntimeError("Connection closed by peer"))
            rank.explain(RuntimeError("something else"))
    assert len(caplog.records) == 1
    assert (
        "a collective failed on pool rank 0 (Connection closed by peer); ranks 0, 1 at step 0" in caplog.text
    )
    for rank in ranks:
        rank.close()


def _wait(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
