"""FLOPs, times and GPU-hours by hand; more ranks never make a search slower."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.config import RunConfig
from opmix_dist.models.flops import count_flops
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.gpus import GPUS
from opmix_dist.plan.question import DataSizes, Question
from opmix_dist.plan.schedule import SearchWork, pool_choices, search_time, search_work
from opmix_dist.plan.searching import CandidateMemory, components
from opmix_dist.plan.storage import storage
from tests.helpers import tiny_llama_config
from tests.plan.test_memory import LENGTH, run_config


def question(config: RunConfig, *, nodes: int = 1, pool_ranks: int = 0) -> Question:
    return Question(
        config=config,
        data=DataSizes(3, LENGTH),
        source=ModelSource(tiny_llama_config()),
        gpu=GPUS["h100"],
        nodes=nodes,
        gpus_per_node=8,
        pool_ranks=pool_ranks,
        mfu=0.4,
        search_mfu=0.4,
        due_within=0.5,
    )


MEMORY = CandidateMemory("lowrank", 2, 3, False, 0, 0, 0)


def test_work_of_a_search() -> None:
    """Four probes of one step of four samples; 12 candidates two at a time, twice four more, and four
    alone."""
    config = run_config()
    asked, names = question(config), components(config, 3)
    flops = count_flops(asked.source.build(), LENGTH, config.search.probes.rank)
    work = search_work(asked, flops, names, MEMORY)
    assert work.probes == pytest.approx([2 * 4 * LENGTH * flops.probe()] * 2)
    assert (work.passes, work.parts) == (2, 2)  # 4 samples by 2; 3 domains x 2 samples by 3
    one = 6 * LENGTH * (flops.forward + 4 * flops.lora_per_adapter)
    assert [len(groups) for groups in work.candidates] == [1, 6, 2, 2, 1, 1, 1]
    assert work.candidate_flops == pytest.approx((12 + 4 + 4 + 4) * one)
    assert work.candidate_tokens == 24 * 6 * LENGTH
    assert work.probe_tokens == 4 * 4 * LENGTH


WORK = SearchWork(
    probes=[12.0, 12.0, 12.0],
    passes=4,
    candidates=[[6.0] * 5, [2.0]],
    parts=2,
    probe_tokens=0,
    candidate_tokens=0,
)


@pytest.mark.parametrize(
    ("ranks", "probes", "candidates"),
    [
        (1, 36.0, 32.0),
        (2, 12.0 + 6.0, 6.0 * 2 + 3.0 + 1.0),  # two groups one each, the third and the fifth shared
        (3, 12.0, 6.0 + 2 * 3.0 + 1.0),  # three groups alone, the other two shared, by parts
        (4, 3 * 3.0, 6.0 + 3.0 + 1.0),
        (8, 3 * 3.0, 6.0 + 1.0),  # five groups of two parts: one each, and the single one shared
    ],
)
def test_times_by_hand(ranks: int, probes: float, candidates: float) -> None:
    """At 1 FLOP a second."""
    found = search_time(WORK, ranks, 1, 1.0)
    assert (found.probes, found.candidates) == (pytest.approx(probes), pytest.approx(candidates))
    assert found.gpu_hours == pytest.approx(ranks * (probes + candidates) / 3600)


def test_a_team_for_each_model() -> None:
    """Two teams of two: each group on two ranks at least, the last one on all four."""
    found = search_time(WORK, 4, 2, 1.0)
    assert found.probes == pytest.approx(6.0 + 3.0)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 64))
def test_more_ranks_are_never_slower(groups: int, pieces: int, ranks: int) -> None:
    work = SearchWork([1.0] * groups, pieces, [[1.0] * groups], pieces, 0, 0)
    assert search_time(work, 2 * ranks, 1, 1.0).seconds <= search_time(work, ranks, 1, 1.0).seconds + 1e-9


def test_what_waits() -> None:
    """8 ranks. Ten steps, two before the search; training is 800 FLOPs, the search 68."""
    config = run_config(train__global_batch_size=28)
    inline, one, two, four = pool_choices(question(config), WORK, 800.0, 1.0, 1.0)
    assert (inline.place, inline.ranks, inline.waiting_gpu_hours) == ("inline", 8, 0.0)
    seconds = 9.0 + 7.0
    assert inline.search.seconds == pytest.approx(seconds)
    assert inline.total_seconds == pytest.approx(100 + seconds)
    assert inline.total_gpu_hours == pytest.approx(8 * (100 + seconds) / 3600)
    assert inline.interval_share == pytest.approx(seconds / (100 * 0.8))
    assert (one.place, one.ranks, one.search.seconds) == ("pool", 1, pytest.approx(68.0))
    training = 800 / 7
    assert one.total_seconds == pytest.approx(training + 68)
    # the trainers wait for the search, the pool for its beginning and for the end of the run
    assert one.waiting_gpu_hours == pytest.approx((7 * 68 + training) / 3600)
    assert (one.in_time, four.in_time) == (False, True)
    assert (two.ranks, four.ranks) == (2, 4)
    assert [choice.batch_divides for choice in (inline, one, two, four)] == [False, True, False, False]
    beside = pool_choices(question(run_config(search__mode="async")), WORK, 800.0, 1.0, 1.0)[1]
    assert beside.total_seconds == pytest.approx(training)


def test_storage_by_hand() -> None:
    """Ten steps, a checkpoint after each third and the last one."""
    config = run_config(
        checkpoint={"interval_steps": 3, "keep": 2},
        engine__snapshot_dtype="bfloat16",
        mixture__policy="opmix",
    )
    found = storage(config, parameters=1000, adapters=10, trainers=16, ranks_per_node=8)
    assert (found.checkpoint, found.checkpoints, found.written) == (12_000, 36_000, 48_000)
    assert (found.snapshot, found.export, found.probes) == (2000, 4000, 40)
    assert (found.host_snapshot, found.host_checkpoint) == (1000, 6000)
    assert found.at_once == 36_000 + 2000 + 4000 + 40
