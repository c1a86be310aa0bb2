"""FLOPs, times and GPU-hours by hand; more ranks never make a search slower."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.config import RunConfig
from opmix_dist.models.devices import peak_flops
from opmix_dist.models.flops import count_flops
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.gpus import GPUS, Gpu
from opmix_dist.plan.question import DataSizes, Question
from opmix_dist.plan.rates import Rates, rates
from opmix_dist.plan.schedule import SearchWork, pool_choice, pool_choices, search_time, search_work
from opmix_dist.plan.searching import CandidateMemory, components
from opmix_dist.plan.storage import storage
from tests.helpers import tiny_llama_config
from tests.plan.test_memory import LENGTH, run_config


def question(config: RunConfig, *, nodes: int = 1, pool_ranks: int = 0, pool_gpu: str = "h100") -> Question:
    return Question(
        config=config,
        data=DataSizes(3, LENGTH),
        source=ModelSource(tiny_llama_config()),
        gpu=GPUS["h100"],
        nodes=nodes,
        gpus_per_node=8,
        pool_ranks=pool_ranks,
        pool_gpu=GPUS[pool_gpu],
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


ONE_FLOP_A_SECOND = Rates(*[1.0] * 6)
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
    (inline, one, two, four), enough = pool_choices(question(config), WORK, 800.0, ONE_FLOP_A_SECOND)
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
    assert (two.in_time, enough) == (True, two), "of 45% of the 133 s after its request"
    assert [choice.batch_divides for choice in (inline, one, two, four)] == [False, True, False, False]
    waits_for_nothing = question(run_config(search__mode="async"))
    beside = pool_choice(waits_for_nothing, WORK, 800.0, ONE_FLOP_A_SECOND, 1)
    assert beside.total_seconds == pytest.approx(training)
    assert beside.trainer_waiting == 0 < beside.pool_waiting
    cut = pool_choice(waits_for_nothing, WORK, 80.0, ONE_FLOP_A_SECOND, 1)
    assert cut.search.seconds > cut.total_seconds
    assert cut.pool_waiting == 0, "and not less"


def test_a_pool_of_other_gpus() -> None:
    """All 8 ranks train at 4 FLOP/s, 25 s in all, 20 of them after the request. A pool of slower GPUs is its
    own launch: 68 s on one rank, 37 on two, 25 on three, of which ten are to do: the candidates are not."""
    config = run_config(pool__external=True, search__mode="async", train__global_batch_size=32)
    asked = question(config, pool_ranks=2, pool_gpu="a100")
    speed = Rates(peak=10.0, inline_peak=10.0, pool_peak=2.5, training=4.0, inline=4.0, pool=1.0)
    choices, enough = pool_choices(asked, WORK, 800.0, speed)
    assert choices[0].search.seconds == pytest.approx(16.0 / 4)
    assert [choice.ranks for choice in choices[1:]] == [1, 2, 4, 8, 16, 32]
    one, two = choices[1:3]
    assert (one.search.seconds, two.search.seconds) == (pytest.approx(68.0), pytest.approx(34.0))
    assert two.total_seconds == pytest.approx(25.0)
    assert two.trainer_gpu_hours == pytest.approx(8 * 25 / 3600)
    assert two.pool_gpu_hours == pytest.approx(2 * 25 / 3600)
    assert two.interval_share == pytest.approx(34 / 20)
    assert enough is None, "sixteen seconds at least, of ten"
    twice = Rates(peak=10.0, inline_peak=10.0, pool_peak=5.0, training=4.0, inline=4.0, pool=2.5)
    choices, enough = pool_choices(asked, WORK, 800.0, twice)
    assert enough is not None
    assert [choice.ranks for choice in choices[1:]] == [1, 2, 3, 4, 8]
    assert enough == choices[3], "three: 25 / 2.5 s, within half of 20 s"


def test_what_each_gpu_computes_at() -> None:
    """A pool computes in the engine's dtype also where training does in float8; a peak that is given is the
    trainers'."""
    config = run_config(engine__param_dtype="bfloat16", engine__float8=True, pool__external=True)
    found = rates(question(config, pool_ranks=8, pool_gpu="a100"))
    assert (found.peak, found.inline_peak, found.pool_peak) == (1979e12, 989.5e12, 312e12)
    assert (found.training, found.inline, found.pool) == pytest.approx((791.6e12, 395.8e12, 124.8e12))
    config = run_config(engine__param_dtype="bfloat16", engine__peak_tflops=500.0, pool__external=True)
    found = rates(question(config, pool_ranks=8, pool_gpu="a100"))
    assert (found.peak, found.inline_peak, found.pool_peak) == (500e12, 500e12, 312e12)
    assert rates(question(config, pool_ranks=8)).pool_peak == 500e12


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_gpu_has_a_peak(gpu: Gpu) -> None:
    assert peak_flops(gpu.device, "bfloat16")


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
