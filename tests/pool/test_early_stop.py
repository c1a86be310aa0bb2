"""Stopping candidates that are worse than the reference: where it shows, and rarely by chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.candidates import simulate_sums
from opmix_dist.pool.early_stop import EarlyStop
from opmix_dist.pool.stream import stratified_order
from opmix_dist.search.problem import Problem
from tests.helpers import tiny_llama, uneven_batch

IDS = np.repeat([0, 1], 32)
TARGETS = np.where(np.arange(64) % 16 == 3, 0, 5)


def problem(num_domains: int = 2, **settings) -> Problem:
    return Problem(np.eye(num_domains), np.full(num_domains, 1 / num_domains), **settings)


def rule(reference: np.ndarray, confidence: float = 0.95, **settings) -> EarlyStop:
    return EarlyStop(
        problem(**settings), reference, TARGETS, IDS, 2, stratified_order(IDS), confidence
    )  # fmt: skip


def sums_of(rng: np.random.Generator, level: float, count: int, hard: np.ndarray) -> np.ndarray:
    """[count, N]: mean loss ``level`` per target, on samples as hard for all, with noise of their own."""
    return TARGETS * (level + hard + 0.1 * rng.standard_normal((count, len(TARGETS))))


def streamed(stop: EarlyStop, sums: np.ndarray, batch_size: int) -> np.ndarray:
    """Samples that each candidate saw [m]."""
    seen, alive = np.full(len(sums), len(stop.order)), np.arange(len(sums))
    looks = stop.looks(batch_size)
    for look in looks:
        part = np.zeros(sums.shape[1], dtype=bool)
        part[stop.order[:look]] = True
        rows = np.broadcast_to(part, (len(alive), len(part)))
        keeps = stop.keeps(np.where(part, sums[alive], 0.0), rows, len(looks))
        seen[alive[~keeps]] = look
        alive = alive[keeps]
        if not alive.size:
            break
    return seen


def test_looks_are_at_ends_of_passes_with_enough_of_every_domain() -> None:
    """An eighth of 64 is 8 samples, 4 of each domain: but sample 3 of each has no target."""
    stop = rule(np.zeros(64))
    assert stop.looks(1) == [16, 32]
    assert stop.looks(6) == [12, 18, 36], "12 have 5 and 5 with targets"
    assert stop.looks(24) == [24, 48]
    assert stop.looks(64) == []
    few = dataclasses.replace(stop, domain_ids=np.where(np.arange(64) < 61, 0, 1))
    assert few.looks(1) == [], "three samples of a domain are too few to know their spread"


def test_one_that_is_as_good_is_stopped_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(0)
    stopped = []
    for _ in range(40):
        hard = rng.standard_normal(64)
        stop = rule(sums_of(rng, 2.0, 1, hard)[0])
        stopped += (streamed(stop, sums_of(rng, 2.0, 50, hard), 4) < 64).tolist()
    # candidates of one reference share its noise, so that the share scatters more than that of 2,000 draws
    assert 0.005 < np.mean(stopped) < 0.07


def test_clearly_worse_ones_are_stopped_at_the_first_look_and_better_ones_never() -> None:
    rng = np.random.default_rng(1)
    hard = 3 * rng.standard_normal(64)
    stop = rule(sums_of(rng, 2.0, 1, hard)[0])
    assert stop.looks(4) == [16, 32]
    assert streamed(stop, sums_of(rng, 3.0, 20, hard), 4).tolist() == [16] * 20
    assert streamed(stop, sums_of(rng, 1.9, 20, hard), 4).tolist() == [64] * 20
    broken = np.full((1, 64), np.nan)
    assert streamed(stop, broken, 4).tolist() == [64], "what is not a number is for others to tell"


def test_the_objective_decides_what_is_worse() -> None:
    """Worse by 1 in a domain without weight, or in one that is not the worst, is not worse."""
    rng = np.random.default_rng(2)
    hard = rng.standard_normal(64)
    level = np.where(IDS == 0, 5.0, 2.0)
    reference, other = sums_of(rng, 0, 2, hard) + TARGETS * level
    other = other + TARGETS * (IDS == 1)
    worse = [
        streamed(rule(reference, **settings), other[None], 4)[0] < 64
        for settings in ({}, {"omega": np.array([1.0, 0.0])}, {"objective": "worst"})
    ]
    assert worse == [True, False, False]
    most = other + TARGETS * 2 * (IDS == 0)
    assert streamed(rule(reference, objective="worst"), most[None], 4)[0] < 64


def test_the_tag_names_the_rule() -> None:
    reference = np.arange(64.0)
    same = rule(reference).tag
    others = [
        rule(reference + 1).tag,
        rule(reference, 0.96).tag,
        rule(reference, omega=np.array([0.3, 0.7])).tag,
        rule(reference, objective="worst").tag,
    ]
    assert len({same, *others}) == 5
    assert rule(reference, kl=0.5, caps=np.array([0.6, 0.6])).tag == same, "as other bounds find them again"


HELDOUT = uneven_batch(3, 40, 12)  # every third sample has no target
DOMAINS = np.repeat([0, 1], 20)
U = np.array([[0.2, 0.8], [1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.05, 0.95]])


@pytest.fixture(scope="module")
def adapters() -> JointAdapters:
    """The first adapter is of no use to the model, the second changes little."""
    found = JointAdapters(tiny_llama(), ["bad", "harmless"], rank=4, alpha=8, seeds=[0, 1])
    generator = torch.Generator().manual_seed(4)
    for layer in found.layers.values():
        layer.B.data[0].normal_(0, 1.0, generator=generator)
        layer.B.data[1].normal_(0, 0.02, generator=generator)
    return found


@pytest.mark.parametrize("method", ["lowrank", "merge"])
def test_what_is_stopped_leaves_its_group_and_the_others_go_on(adapters: JointAdapters, method) -> None:
    targets, order = HELDOUT.targets.numpy(), stratified_order(DOMAINS)
    reference = simulate_sums(adapters, np.array([[0.0, 1.0]]), HELDOUT, method=method, batch_size=5).sums[0]
    stop = EarlyStop(problem(), reference, targets, DOMAINS, 2, order, 0.9)
    looks = stop.looks(5)
    assert looks
    ticks: list[int] = []
    found = simulate_sums(
        adapters, U, HELDOUT, method=method, batch_size=5, joint=3, order=order, stopping=stop,
        on_progress=ticks.append,
    )  # fmt: skip
    in_full = simulate_sums(adapters, U, HELDOUT, method=method, batch_size=16).sums
    expected = streamed(stop, in_full, 5)
    assert found.seen.sum(axis=1).tolist() == expected.tolist()
    assert 40 in expected
    assert set(expected) & set(looks), "nothing was stopped: this shows nothing"
    for row, count in enumerate(expected):
        assert found.seen[row, order[:count]].all()
    np.testing.assert_allclose(found.sums, np.where(found.seen, in_full, 0.0), rtol=2e-6)
    assert sum(ticks) == U.shape[0] * 40, "what is left out is done, too"


def test_without_a_rule_the_order_changes_nothing_but_rounding(adapters: JointAdapters) -> None:
    order = stratified_order(DOMAINS)
    ours = simulate_sums(adapters, U, HELDOUT, method="lowrank", batch_size=7, joint=2, order=order)
    theirs = simulate_sums(adapters, U, HELDOUT, method="lowrank", batch_size=7, joint=2)
    assert ours.seen.all()
    np.testing.assert_allclose(ours.sums, theirs.sums, rtol=2e-6)
