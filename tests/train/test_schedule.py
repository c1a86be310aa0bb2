"""Learning rates worked out by hand."""

from __future__ import annotations

import itertools

import pytest

from opmix_dist.config import ScheduleConfig
from opmix_dist.train.schedule import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate(config, 8.0, step, steps) for step in range(steps)]


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    found = rates(10, name="wsd", warmup_steps=3, decay_fraction=0.4, min_lr_ratio=0.0)
    assert found == pytest.approx([2, 4, 6, 8, 8, 8, 8, 6, 4, 2])


def test_a_warm_up_may_begin_above_zero() -> None:
    found = rates(5, name="wsd", warmup_steps=3, warmup_from=0.5, decay_fraction=0.0)
    assert found == [5, 6, 7, 8, 8]


def test_wsd_without_decay_is_constant() -> None:
    assert rates(4, name="wsd", decay_fraction=0.0) == [8.0] * 4 == rates(4, name="constant")


def test_cosine_is_half_way_in_the_middle_and_keeps_its_floor() -> None:
    found = rates(9, name="cosine", warmup_steps=1, min_lr_ratio=0.5)
    assert found[:2] == pytest.approx([4, 8])
    assert found[5] == pytest.approx(6)
    assert all(a > b > 4 for a, b in itertools.pairwise(found[1:]))
