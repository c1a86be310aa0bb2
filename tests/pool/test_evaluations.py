"""Evaluations on disk: read back to the bit, and made again where they are damaged, foreign or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.loader import EvalSet
from opmix_dist.distributed import World
from opmix_dist.models.loss import losses_by_domain
from opmix_dist.pool.early_stop import EarlyStop
from opmix_dist.pool.evaluation_files import identity_of
from opmix_dist.pool.evaluations import Evaluations, Evaluator, Measurement, Work
from opmix_dist.pool.team import ALONE, Crew, Team
from opmix_dist.search.problem import Problem
from tests.helpers import random_tokens
from tests.pool.searches import alone

DOMAIN_IDS = np.array([0, 0, 0, 1, 1])
HELDOUT = EvalSet(TokenBatch.of_tokens(random_tokens(0, 5, 8)), torch.from_numpy(DOMAIN_IDS))
U = np.random.default_rng(0).dirichlet(np.ones(3), size=7)


class Simulation:
    """Losses that depend on the candidates, and on which of them are simulated together in the last digits,
    as those of batched products do."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.calls: list[np.ndarray] = []
        self.fails_at = fails_at

    def __call__(
        self, rows: np.ndarray, gradients: bool, stopping: EarlyStop | None, team: Team = ALONE
    ) -> Measurement:
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(rows)
        sums = 7 * (3 + rows @ np.arange(15).reshape(3, 5) / 10) * (1 + len(rows) * 1e-13)
        return sums, None, np.ones((len(rows), 2, 3)) * rows[:, None] if gradients else None

    @property
    def simulated(self) -> int:
        return sum(map(len, self.calls))


def evaluator_of(
    folder: Path, simulation: Simulation, world: World, *, identity: str = "a", **options: Any
) -> Evaluator:
    return Evaluator(
        folder,
        identity,
        HELDOUT,
        2,
        world=world,
        crew=Crew(ALONE, ALONE),
        joint=3,
        passes=lambda gradients: 1,
        together=lambda work: work(),
        simulate=simulation,
        **options,
    )


def evaluate(
    folder: Path,
    simulation: Simulation,
    U: np.ndarray = U,
    *,
    gradients: bool = False,
    stopping: EarlyStop | None = None,
    identity: str = "a",
) -> Evaluations:
    with alone() as world:
        evaluator = evaluator_of(folder, simulation, world, identity=identity)
        return evaluator.evaluate(U, gradients=gradients, stopping=stopping)


@pytest.fixture
def whole(tmp_path: Path) -> Evaluations:
    return evaluate(tmp_path / "whole", Simulation())


def test_a_second_attempt_evaluates_only_what_is_missing(tmp_path: Path, whole: Evaluations) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "e", Simulation(fails_at=2))
    assert len(list((tmp_path / "e").iterdir())) == 5, "groups of three and two"
    second = Simulation()
    again = evaluate(tmp_path / "e", second)
    assert second.simulated == 2
    np.testing.assert_array_equal(again.sums, whole.sums)
    third = Simulation()
    np.testing.assert_array_equal(evaluate(tmp_path / "e", third).sums, whole.sums)
    assert third.simulated == 0


def test_a_group_is_simulated_as_it_was(tmp_path: Path, whole: Evaluations) -> None:
    """One of three files is lost: alone its last digits would be others."""
    evaluate(tmp_path / "e", Simulation())
    path = next(p for p in (tmp_path / "e").iterdir())
    path.unlink()
    second = Simulation()
    np.testing.assert_array_equal(evaluate(tmp_path / "e", second).sums, whole.sums)
    assert second.simulated in (2, 3)
    lonely = Simulation()
    alone_again = evaluate(tmp_path / "f", lonely, U[:1])
    assert not np.array_equal(alone_again.sums[0], whole.sums[0]), "the simulation shows no grouping"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"\xff" * 8 + data[8:],
    ],
    ids=["torn", "empty", "a bit", "header"],
)
def test_damaged_files_are_evaluated_again(tmp_path: Path, whole: Evaluations, damage) -> None:
    evaluate(tmp_path / "e", Simulation())
    for path in (tmp_path / "e").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    second = Simulation()
    np.testing.assert_array_equal(evaluate(tmp_path / "e", second).sums, whole.sums)
    assert second.simulated == len(U)


def test_files_of_another_evaluation_are_foreign(tmp_path: Path) -> None:
    """By name, and by content where one was renamed."""
    evaluate(tmp_path / "e", Simulation(), identity="a")
    second = Simulation()
    evaluate(tmp_path / "e", second, identity="b")
    assert second.simulated == len(U)
    first, other, *_ = sorted((tmp_path / "e").iterdir())
    other.write_bytes(first.read_bytes())
    third = Simulation()
    for identity in "ab":
        evaluate(tmp_path / "e", third, identity=identity)
    assert third.simulated >= 1


def test_gradients_are_taken_where_a_file_has_none(tmp_path: Path) -> None:
    evaluate(tmp_path / "e", Simulation())
    second = Simulation()
    found = evaluate(tmp_path / "e", second, gradients=True)
    assert second.simulated == len(U)
    assert [len(rows) for rows in second.calls] == [1] * len(U), "one at a time: a graph each"
    np.testing.assert_array_equal(found.gradients, np.ones((7, 2, 3)) * U[:, None])
    third = Simulation()
    np.testing.assert_array_equal(evaluate(tmp_path / "e", third, gradients=True).gradients, found.gradients)
    assert evaluate(tmp_path / "e", third).gradients is None, "nobody asked"
    assert third.simulated == 0


def test_losses_and_changes_from_a_base(tmp_path: Path, whole: Evaluations) -> None:
    base = evaluate(tmp_path / "b", Simulation(), np.zeros((1, 3)))
    targets = HELDOUT.batch.targets.numpy()
    expected = losses_by_domain(whole.sums, targets, DOMAIN_IDS, 2)
    np.testing.assert_array_equal(whole.losses.loss, expected.loss)
    change = whole.changes_from(base)
    np.testing.assert_allclose(change.loss, whole.losses.loss - base.losses.loss, rtol=1e-9)
    differences = (whole.sums - base.sums)[0, :3] / 7
    assert change.stderr[0, 0] == pytest.approx(differences.std(ddof=1) / np.sqrt(3))


def test_the_identity_sees_what_losses_depend_on(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights, adapter = tmp_path / "base" / "model.safetensors", tmp_path / "adapter"
    weights.write_bytes(b"w" * 3_000_000)
    adapter.write_bytes(b"a")

    def identity(name: str = "snapshot", heldout: EvalSet = HELDOUT, *settings: object) -> str:
        return identity_of(name, tmp_path / "base", [adapter], heldout, *settings)

    first = identity()
    others = [identity("other"), identity("snapshot", HELDOUT, "merge")]
    batch = HELDOUT.batch
    fewer = TokenBatch(batch.tokens, batch.loss_mask & (torch.arange(8) > 2))
    others.append(identity("snapshot", EvalSet(fewer, HELDOUT.domain_ids)))
    adapter.write_bytes(b"b")
    others.append(identity())
    weights.write_bytes(b"w" * 2_999_999 + b"v")
    others.append(identity())
    assert len({first, *others}) == 6
    assert identity() == others[-1]


def test_resampled_losses_by_hand_and_with_their_standard_error() -> None:
    """A domain of one sample stays; the other's losses have the standard error of a ratio of sums."""
    targets, ids = np.array([4, 2, 3, 0, 5]), np.array([0, 1, 1, 1, 1])
    sums = np.array([[8.0, 2.0, 6.0, 0.0, 4.0], [6.0, 4.0, 6.0, 0.0, 9.0]])
    found = Evaluations(sums, None, targets, ids, 2).resampled(4000, np.random.default_rng(0))
    np.testing.assert_allclose(found[..., 0], [[2.0, 1.5]] * 4000)
    losses = [12 / 10, 19 / 10]
    residuals = sums[:, [1, 2, 4]] - np.outer(losses, [2, 3, 5])
    stderr = np.sqrt((residuals**2).sum(axis=1)) / 10  # without N / (N - 1), which drawing from N leaves out
    np.testing.assert_allclose(found[..., 1].std(axis=0), stderr, rtol=0.2)
    np.testing.assert_allclose(found[..., 1].mean(axis=0), losses, atol=0.05)
    # the same samples for both: only sample 1 three times gives 2 / 2, and 4 / 2 with it
    thrice = np.isclose(found[:, 0, 1], 1.0)
    assert thrice.mean() == pytest.approx(1 / 27, abs=0.01)
    np.testing.assert_allclose(found[thrice, 1, 1], 2.0)


def stopping(confidence: float = 0.9) -> EarlyStop:
    return EarlyStop(
        problem=Problem(np.eye(2), np.full(2, 0.5)),
        reference=np.full(5, 20.0),
        targets=HELDOUT.batch.targets.numpy(),
        domain_ids=DOMAIN_IDS,
        num_domains=2,
        order=np.array([0, 3, 1, 4, 2]),
        confidence=confidence,
    )


class Stopped(Simulation):
    """Stops every other candidate of a group after the samples 0 and 3."""

    def __call__(
        self, rows: np.ndarray, gradients: bool, stopping: EarlyStop | None, team: Team = ALONE
    ) -> Measurement:
        sums, _, slopes = super().__call__(rows, gradients, stopping)
        if stopping is None:
            return sums, None, slopes
        seen = np.full(sums.shape, True)
        seen[::2, [1, 2, 4]] = False
        return np.where(seen, sums, 0.0), seen, slopes


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_an_attempt_with_stopped_candidates_goes_on_to_the_same(tmp_path: Path, killed_at: int) -> None:
    whole = evaluate(tmp_path / "whole", Stopped(), stopping=stopping())
    assert whole.stopped.tolist() == [True, False, True, True, False, True, False]
    assert whole.targets_seen[0].tolist() == [7, 7], "of 21 and 14"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "e", Stopped(fails_at=killed_at), stopping=stopping())
    second = Stopped()
    again = evaluate(tmp_path / "e", second, stopping=stopping())
    assert second.simulated == len(U) - (0, 3, 5)[killed_at]
    for name in ("sums", "seen", "reference"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_what_was_stopped_is_simulated_in_full_where_that_is_asked_for(tmp_path: Path) -> None:
    """Both are kept: the attempt after it finds at each ask what it found there before."""
    first = evaluate(tmp_path / "e", Stopped(), stopping=stopping())
    second = Stopped()
    assert evaluate(tmp_path / "e", second).seen is None
    assert second.simulated == len(U)
    third = Stopped()
    again = evaluate(tmp_path / "e", third, stopping=stopping())
    assert third.simulated == 0
    np.testing.assert_array_equal(again.seen, first.seen)
    np.testing.assert_array_equal(again.sums[first.stopped], first.sums[first.stopped])
    fourth = Stopped()
    other = evaluate(tmp_path / "e", fourth, stopping=stopping(0.8))
    assert fourth.simulated == 0
    assert other.seen is None, "of another rule, but evaluated in full"


def test_damaged_files_of_stopped_candidates_are_evaluated_again(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "e", Stopped(), stopping=stopping())
    for path in (tmp_path / "e").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    second = Stopped()
    np.testing.assert_array_equal(evaluate(tmp_path / "e", second, stopping=stopping()).sums, whole.sums)
    assert second.simulated == len(U)


def test_what_was_asked_before_is_in_no_group(tmp_path: Path) -> None:
    """The reference is evaluated alone and then asked for among others: its digits stay, and the groups of an
    attempt that finds its file are those of the attempt that wrote it."""
    sums = []
    for killed in (False, True):
        first = Simulation(fails_at=2 if killed else None)
        with alone() as world:
            evaluator = evaluator_of(tmp_path / str(killed), first, world)
            reference = evaluator.evaluate(U[2:3])
            if killed:
                with pytest.raises(KeyboardInterrupt):
                    evaluator.evaluate(U)
            else:
                sums.append(evaluator.evaluate(U).sums)
                assert [len(rows) for rows in first.calls] == [1, 3, 3]
                assert evaluator.work[False] == Work(candidates=7, samples=35), "each once"
                np.testing.assert_array_equal(sums[0][2], reference.sums[0])
    second = Simulation()
    with alone() as world:
        evaluator = evaluator_of(tmp_path / "True", second, world)
        evaluator.evaluate(U[2:3])
        sums.append(evaluator.evaluate(U).sums)
        assert evaluator.work[False] == Work(candidates=7, samples=35), "of both attempts"
    assert [len(rows) for rows in second.calls] == [3]
    np.testing.assert_array_equal(*sums)


def test_work_is_counted_by_samples_and_kind(tmp_path: Path) -> None:
    ticks: list[int] = []
    with alone() as world:
        evaluator = evaluator_of(tmp_path / "e", Stopped(), world, on_progress=ticks.append)
        evaluator.evaluate(U, stopping=stopping())
        assert evaluator.work[False] == Work(candidates=7, samples=3 * 5 + 4 * 2)
        evaluator.evaluate(U[:1])
        assert evaluator.work[False] == Work(candidates=8, samples=28), "in full is another evaluation"
        evaluator.evaluate(U[:1], gradients=True)
        assert evaluator.work[True] == Work(candidates=1, samples=5)
        evaluator.evaluate(U[:1])
        assert evaluator.work[False] == Work(candidates=8, samples=28)
    assert sum(ticks) == 5, "the last one was read"


def test_samples_of_a_cluster_are_one() -> None:
    """Domain 0 has clusters of samples 0, 2 and of 1, domain 1 of 3 and of 4. Sums 6, 1, 4 of 2, 1, 2
    targets: the loss is 11/5, the residuals 10 - 11/5 * 4 = 6/5 and 1 - 11/5 = -6/5, the error
    sqrt(2 * 2 * 36/25) / 5.
    """
    one = Evaluations(
        sums=np.array([[6.0, 1.0, 4.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 3.0]]),
        gradients=None,
        targets=np.array([2, 1, 2, 1, 1]),
        domain_ids=DOMAIN_IDS,
        num_domains=2,
    )
    found = one.clustered(np.array([0, 1, 0, 2, 3]))
    assert found.targets.tolist() == [4, 1, 1, 1]
    assert found.domain_ids.tolist() == [0, 0, 1, 1]
    assert found.losses.loss == pytest.approx(one.losses.loss)
    assert found.losses.stderr[0].tolist() == pytest.approx([2.4 / 5, 0.0])
    assert found.losses.stderr[1, 1] == pytest.approx(one.losses.stderr[1, 1]) == pytest.approx(1.0)
    drawn = found.resampled(200, np.random.default_rng(0))[:, 0, 0]
    assert {round(value, 6) for value in drawn} == {round(value, 6) for value in (10 / 4, 11 / 5, 1.0)}
