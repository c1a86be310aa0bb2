from __future__ import annotations

import math

import pytest

from opmix_dist.observe.pace import Pace, seconds_left
from opmix_dist.observe.phrases import duration, sparkline


def test_the_pace_is_that_of_what_was_seen() -> None:
    pace = Pace()
    assert pace.per_second is None
    pace.see("a", 10, at=100.0)
    assert pace.per_second is None
    pace.see("a", 10, at=104.0)
    assert pace.per_second is None
    pace.see("a", 30, at=110.0)
    assert pace.per_second == 2.0
    assert seconds_left(30, 100, pace.per_second) == 35.0


@pytest.mark.parametrize("after", [("b", 40), ("a", 5)])
def test_another_thing_and_one_that_went_back_begin_anew(after: tuple[str, float]) -> None:
    pace = Pace()
    pace.see("a", 10, at=0.0)
    pace.see("a", 20, at=1.0)
    pace.see(*after, at=2.0)
    assert pace.per_second is None
    pace.see(after[0], after[1] + 6, at=4.0)
    assert pace.per_second == 3.0


def test_what_slowed_down_is_not_promised_its_old_speed() -> None:
    pace = Pace()
    for second in range(0, 600, 10):
        pace.see("a", 100 * second, at=float(second))
    for second in range(600, 1800, 10):
        pace.see("a", 60_000 + (second - 600), at=float(second))
    assert pace.per_second == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("done", "total", "speed"), [(5, 5, 1.0), (6, 5, 1.0), (1, 5, None), (1, 5, 0.0)])
def test_no_time_is_left_where_none_is_known(done: float, total: float, speed: float | None) -> None:
    assert seconds_left(done, total, speed) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0.0 s"), (0.44, "0.4 s"),
        (45.2, "45 s"), (90, "2 min"), (5369, "89 min"), (5399, "1 h 30 min"),
        (7500, "2 h 05 min"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparklines() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 3, 8, 8], 2) == "▁█"
    assert sparkline([5, math.nan, 5, math.inf], 10) == "▁▁"
    assert sparkline([], 10) == ""
