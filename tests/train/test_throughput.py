"""Times of a step and memory of a process, with a real engine on one rank."""

from __future__ import annotations

import time

import pytest
import torch

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.held import HeldBytes
from opmix_dist.engines.single import SingleEngine
from opmix_dist.exchange.schemas import PhaseCost, TrainLine
from opmix_dist.ledger import Ledger
from opmix_dist.models.source import ModelSource
from opmix_dist.train.callbacks import speed_text
from opmix_dist.train.throughput import Throughput, _worst, peak_resident_bytes
from tests.helpers import tiny_llama_config

LENGTH = 16
OLD_LINE = {
    "step": 1, "loss": 1.0, "domain_loss": {}, "grad_norm": 1.0, "lr": 0.1, "tokens": 1,
    "tokens_per_second": 1200.0, "mixture_version": 0,
}  # fmt: skip


def engine(**settings: object) -> SingleEngine:
    return SingleEngine(
        ModelSource(tiny_llama_config()),
        World(Placement(Role.TRAINER, 0, 1), torch.device("cpu")),
        config=EngineConfig(**settings),
        optimizer=OptimizerConfig(),
        sequence_length=LENGTH,
    )


def throughput(ledger: Ledger, **settings: object) -> Throughput:
    return Throughput(engine(**settings), ledger, peak_flops=ledger.peak_flops, memory_interval=2)


def test_a_step_lasts_from_the_end_of_the_one_before_without_what_has_a_phase() -> None:
    ledger = Ledger(1)
    meter = throughput(ledger)
    start = time.perf_counter()
    meter.start()
    with ledger.timed("held-out evaluation"), ledger.timed("a part of it"):
        time.sleep(0.1)
    with ledger.aside():
        time.sleep(0.1)
    with meter.waiting_for_data():
        time.sleep(0.1)
    time.sleep(0.1)  # computing, logging
    first = meter.lap()
    assert 0.1 <= float(meter.readings(1)[0]) <= first - 0.1
    second = meter.lap()
    assert first + second <= time.perf_counter() - start - 0.2, "a new step begins where one has ended"
    assert set(ledger.costs) == {"held-out evaluation", "a part of it"}


def test_utilisation_by_hand() -> None:
    """1,000 tokens in half a second on two ranks, of which the second waited longer."""
    ledger = Ledger(2, peak_flops=1e9)
    meter = throughput(ledger, activation_checkpointing="full")
    found = meter.describe(torch.tensor([[0.1], [0.2]]), tokens=1000, tokens_per_pass=32, seconds=0.5)
    model = meter.engine.flops.train()
    # blocks, less what only the residual stream gets: 2 * 48 * 32 of each of two
    again = meter.engine.flops.blocks - 2 * 2 * 48 * 32
    assert found == {
        "tokens_per_second": 2000.0,
        "tokens_per_second_per_device": 1000.0,
        "seconds": 0.5,
        "data_seconds": pytest.approx(0.2),
        "mfu": pytest.approx(1000 * model / 1e9),
        "hfu": pytest.approx(1000 * (model + again) / 1e9),
        "memory": None,
    }
    unknown = throughput(Ledger(1)).describe(torch.tensor([[0.0]]), tokens=1, tokens_per_pass=1, seconds=1.0)
    assert (unknown["mfu"], unknown["hfu"]) == (None, None)


def test_a_head_in_chunks_is_computed_twice() -> None:
    small = engine(logits_memory=64 * 4)  # the logits of a token
    assert small.recomputed_flops(1) == 0
    assert small.recomputed_flops(2) == small.flops.head == 2 * 32 * 64


def test_memory_is_that_of_the_rank_with_the_highest_peak() -> None:
    ranks = torch.tensor([[10, 20, 30, 5, 100, 0], [11, 21, 31, 6, 200, 0]], dtype=torch.float64)
    found = _worst(ranks, torch.device("cpu"))
    assert (found.rank, found.peak, found.reserved, found.offloaded) == (1, 200, None, 6)
    assert found.activations_and_others == 200 - 11 - 21 - 31
    assert found.measured == "resident"


def test_memory_is_read_every_so_many_steps() -> None:
    meter = throughput(Ledger(1))
    assert [len(meter.readings(step)) for step in (1, 2, 3, 4)] == [1, 7, 1, 7]


def test_the_peak_of_a_process_stays() -> None:
    before = peak_resident_bytes()
    block = torch.ones(64 << 20)
    grown = peak_resident_bytes()
    assert grown >= before
    assert grown >= block.nbytes
    del block
    assert peak_resident_bytes() > grown - (8 << 20), "the kernel counts by some pages"


def test_one_process_holds_the_model_and_twice_that_for_adamw() -> None:
    found = engine()
    whole = 4 * found.num_parameters
    assert found.held_bytes() == HeldBytes(whole, whole, 2 * whole)


def test_possible_flops_are_known_of_whole_phases_only() -> None:
    ledger = Ledger(2, {"train": PhaseCost(seconds=1, device_seconds=2, flops=5)}, peak_flops=10.0)
    ledger.add("train", seconds=3.0, flops=1.0)
    ledger.add("evaluation", seconds=3.0, flops=30.0)
    assert ledger.costs["train"].mfu is None, "of an attempt whose devices nobody knows"
    assert ledger.costs["evaluation"].mfu == 0.5


def test_lines_from_before_speed_was_measured_are_read_and_shown() -> None:
    line = TrainLine.model_validate(OLD_LINE)
    assert (line.mfu, line.memory, line.seconds) == (None, None, None)
    assert speed_text(line, 1) == "1,200 tokens/s"
    known = {"tokens_per_second_per_device": 600.0, "seconds": 1.0, "data_seconds": 0.12, "mfu": 0.4124}
    line = TrainLine.model_validate(OLD_LINE | known)
    assert speed_text(line, 2) == "1,200 tokens/s (600 each)  MFU 41.2%  data 12%"
