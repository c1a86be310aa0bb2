"""Whole searches in this process: killed and gone on with, by each method, and what they write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from opmix_dist.config import RunConfig
from opmix_dist.exchange.rundir import SearchDir, read_record
from opmix_dist.exchange.schemas import EvaluationPlan, SearchStage
from opmix_dist.models.flops import count_flops
from opmix_dist.models.loss import paired_stderr
from opmix_dist.pool import evaluating
from opmix_dist.pool.candidates import Simulated
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.plan import Planner
from opmix_dist.pool.records import Outcome, proposal_record
from opmix_dist.pool.requests import staying
from opmix_dist.pool.status import StatusWriter
from opmix_dist.search.ask_tell import SearchResult
from opmix_dist.search.laws import Observations
from opmix_dist.search.problem import Problem
from opmix_dist.search.proposal import Proposal
from opmix_dist.search_config import ProposalConfig
from tests.conftest import DOMAINS
from tests.helpers import tiny_llama
from tests.pool.searches import CURRENT, answer, quick_config, request

COMPONENTS = ["old", *DOMAINS]


def searched(data: Path, folder: Path, current: dict[str, float] = CURRENT, **search: Any) -> SearchDir:
    config = quick_config(data, folder, **search)
    found = answer(config, request(config, current))
    status = found.status()
    assert status is not None
    assert status.stage is SearchStage.PROPOSED, status.reason
    return found


def lasting(search: SearchDir) -> tuple:
    """All that a search answers but what it cost."""
    proposal = search.proposal().model_dump(exclude={"costs"})
    return proposal, search.fit(), pq.read_table(search.candidates_file).to_pylist()


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchDir:
    return searched(tiny_data, tmp_path_factory.mktemp("search") / "run")


class Killed(BaseException):
    """Nothing catches it: as good as a kill."""


def answer_killed(config: RunConfig, search: SearchDir, calls: int) -> list[int]:
    """A search that dies in the simulation after so many; the candidates of each of these."""
    simulate = evaluating.simulate_sums
    evaluated: list[int] = []

    def killed(adapters: Any, U: np.ndarray, *rest: Any, **options: Any) -> Simulated:
        if len(evaluated) == calls:
            raise Killed
        evaluated.append(len(U))
        return simulate(adapters, U, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "simulate_sums", killed)
        with pytest.raises(Killed):
            answer(config, search)
    return evaluated


@pytest.mark.parametrize("calls", [1, 4])
def test_a_search_killed_in_its_evaluations_goes_on_to_the_same_proposal(
    finished: SearchDir, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    config = quick_config(tiny_data, tmp_path / "run")
    search = request(config)
    evaluated = answer_killed(config, search, calls)
    written = {path.name for path in search.evaluations.iterdir()}
    assert len(written) == sum(evaluated)
    trained = [search.probe(name).joinpath("COMPLETE.json").stat().st_mtime_ns for name in COMPONENTS]
    again, simulate = [], evaluating.simulate_sums

    def counted(adapters: Any, U: np.ndarray, *rest: Any, **options: Any) -> Simulated:
        again.append(len(U))
        return simulate(adapters, U, *rest, **options)

    monkeypatch.setattr(evaluating, "simulate_sums", counted)
    answer(config, search)
    assert lasting(search) == lasting(finished)
    assert sum(evaluated) + sum(again) == len(list(search.evaluations.iterdir())) == 10, (
        "snapshot, 7 candidates of which one stays, staying like the proposal, proposal: each once"
    )
    assert trained == [search.probe(name).joinpath("COMPLETE.json").stat().st_mtime_ns for name in COMPONENTS]
    ours, theirs = search.proposal().costs["evaluation"], finished.proposal().costs["evaluation"]
    assert (ours.tokens, ours.flops) == (theirs.tokens, theirs.flops), "of all attempts"


def test_what_a_search_writes_fits_together(finished: SearchDir) -> None:
    proposal, fit, rows = finished.proposal(), finished.fit(), pq.read_table(finished.candidates_file)
    request = finished.request()
    composition = np.array(request.composition)
    u = np.array([proposal.coefficients[name] for name in COMPONENTS])
    assert u @ composition == pytest.approx(list(proposal.weights.values()), abs=1e-9)
    log_c, t = np.array(fit.parameters["log_c"]), np.array(fit.parameters["t"])
    assert (fit.family, log_c.shape, t.shape) == ("log_linear", (3,), (3, 4))
    law = np.exp(log_c) + np.exp(t @ u)
    assert law == pytest.approx([proposal.predicted[d] for d in DOMAINS], rel=1e-9)
    table = rows.to_pylist()
    candidates = [row for row in table if row["kind"] == "candidate"]
    assert len(candidates) == 7 * 3
    for row in candidates:
        d, at = DOMAINS.index(row["domain"]), np.array([row[f"u_{name}"] for name in COMPONENTS])
        assert row["predicted"] == pytest.approx(np.exp(log_c[d]) + np.exp(t[d] @ at), rel=1e-9)
        assert row["stderr_change"] > 0
    residuals = np.array([row["left_out"] - row["loss"] for row in candidates]).reshape(7, 3)
    assert fit.loo_error == pytest.approx(np.sqrt((residuals**2).mean(axis=0)).tolist(), rel=1e-6)
    for name in DOMAINS:
        interval = proposal.intervals[name]
        assert 0 <= interval.low <= interval.high <= 1
    gain = proposal.gain
    assert gain is not None
    change = [proposal.simulated_current[d] - proposal.simulated[d] for d in DOMAINS]
    assert gain.measured == pytest.approx(np.mean(change), rel=1e-9)
    predicted = [proposal.predicted_current[d] - proposal.predicted[d] for d in DOMAINS]
    assert gain.predicted == pytest.approx(np.mean(predicted), rel=1e-9)
    stay = np.array([proposal.stay[name] for name in COMPONENTS])
    assert stay @ composition == pytest.approx(list(CURRENT.values())), "another way to the same mixture"
    assert stay @ stay == pytest.approx(u @ u), "with as many probes"
    alone = np.mean([row["loss"] for row in candidates if row["candidate"] == 0])
    assert gain.averaging == pytest.approx(alone - np.mean(list(proposal.simulated_current.values())))
    assert proposal.decision is not None
    assert gain.optimism is not None
    assert gain.optimism >= 0
    assert proposal.decision.move == (gain.measured - gain.optimism > 1.2815515655446004 * gain.stderr)


def test_one_search_by_gradients_and_one_with_refinement(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    descended = searched(tiny_data, run, method="gradient", gradient={"max_evaluations": 4}).proposal()
    assert descended.gain is not None
    assert descended.gain.predicted is None
    assert descended.intervals == {}
    assert 1 <= descended.rounds <= 4
    assert not run.joinpath("searches/0001/fit.json").exists()
    refined = searched(
        tiny_data, run, refinement={"rounds": 1, "count": 2}, gradients=True, law={"averaging": True}
    )
    proposal = refined.proposal()
    assert proposal.rounds == 2
    rows = pq.read_table(refined.candidates_file).to_pylist()
    assert sum(row["kind"] == "candidate" for row in rows) == (7 + 2) * 3
    assert proposal.gain is not None


def test_a_new_domain_joins_by_two_probes(tiny_data: Path, tmp_path: Path) -> None:
    current = {"json": 0.25, "prose": 0.0, "python": 0.75}
    search = searched(tiny_data, tmp_path / "run", current, new_domains=["prose"])
    request, proposal = search.request(), search.proposal()
    assert request.components == ["old", "prose"]
    expected = [[0.9 * 0.25, 0.1, 0.9 * 0.75], [0.1 * 0.25, 0.9, 0.1 * 0.75]]
    np.testing.assert_allclose(request.composition, expected)
    assert list(request.prior.values()) == pytest.approx(expected[0])
    rows = pq.read_table(search.candidates_file).to_pylist()
    shares = sorted({round(row["x_prose"], 9) for row in rows if row["kind"] == "candidate"})
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert 0.1 <= proposal.weights["prose"] <= 0.9
    assert proposal.decision is not None
    assert proposal.decision.move


def test_bounds_that_nothing_keeps_fail_the_search_by_name(tiny_data: Path, tmp_path: Path) -> None:
    config = quick_config(tiny_data, tmp_path / "run", proposal={"floors": {"json": 0.98}})
    status = answer(config, request(config)).status()
    assert status is not None
    assert status.stage is SearchStage.FAILED
    assert "floor of json (0.98)" in status.reason
    assert "\n" not in status.reason


def test_a_mixture_that_breaks_a_bound_does_not_stay(tiny_data: Path, tmp_path: Path) -> None:
    search = searched(tiny_data, tmp_path / "run", proposal={"caps": {"json": 0.4}, "confidence": 0.999999})
    proposal = search.proposal()
    assert proposal.weights["json"] <= 0.4 + 1e-6
    assert proposal.decision is not None
    assert proposal.decision.move
    assert "the mixture cannot stay: cap of json (0.4) is exceeded by 0.1" in proposal.decision.reason


def test_paired_errors_by_hand() -> None:
    """Two domains of two samples with a target each; hard samples are hard for both models."""
    ids, targets = np.array([0, 0, 1, 1]), np.ones(4, dtype=np.int64)
    first, second = np.array([9.0, 1.0, 4.0, 6.0]), np.array([8.0, 0.4, 4.0, 5.0])
    slopes = np.array([0.5, 0.5])
    # differences 1, 0.6 and 0, 1: standard deviations of their means 0.2 and 0.5
    expected = 0.5 * np.sqrt(0.2**2 + 0.5**2)
    assert paired_stderr((first, slopes), (second, slopes), targets, ids) == pytest.approx(expected)
    # the worst domain of the one is domain 0, that of the other domain 1: nothing cancels
    worst = paired_stderr((first, np.array([1.0, 0.0])), (second, np.array([0.0, 1.0])), targets, ids)
    assert worst == pytest.approx(np.sqrt(4.0**2 + 0.5**2))


def test_staying_with_as_many_probes_as_the_proposal(finished: SearchDir) -> None:
    """The current mixture is 0.5, 0.3, 0.2, so that spread probes have sum u^2 = 0.38."""
    request = finished.request()
    assert staying(request).tolist() == [1, 0, 0, 0]
    composition, current = np.array(request.composition), np.array(list(CURRENT.values()))
    # a^2 + 0.38 (1 - a)^2 = 0.5 at a = (0.38 +- sqrt(0.5 * 1.38 - 0.38)) / 1.38
    for weight_of_old, sign in ((0.0, 1), (0.7, 1)):
        like = np.array([weight_of_old, 0.0, 0.0, np.sqrt(0.5 - weight_of_old**2)])
        a = (0.38 + sign * np.sqrt(0.31)) / 1.38
        np.testing.assert_allclose(staying(request, like), [a, *((1 - a) * current)])
    # 0.32: (0.38 +- sqrt(0.0616)) / 1.38 are both possible: the proposal's `old` decides
    for weight_of_old, a in ((0.4, 0.455213), (0.1, 0.095512)):
        like = np.array([weight_of_old, np.sqrt(0.32 - weight_of_old**2), 0.0, 0.0])
        found = staying(request, like)
        np.testing.assert_allclose(found, [a, *((1 - a) * current)], atol=1e-4)
        np.testing.assert_allclose(found @ found, 0.32, atol=1e-9)
    # below 0.38 / 1.38 nothing reaches: the most probes there are
    assert staying(request, np.full(4, 0.25))[0] == pytest.approx(0.38 / 1.38)
    for like in np.random.default_rng(0).dirichlet(np.ones(4), size=50):
        found = staying(request, like)
        assert found.min() >= 0
        np.testing.assert_allclose(found @ composition, current, atol=1e-12)
        assert found @ found == pytest.approx(max(like @ like, 0.38 / 1.38), abs=1e-9)


def test_what_measuring_tells_against_a_proposal_is_said(finished: SearchDir) -> None:
    """Staying at 0.5, 0.3, 0.2 mixes 1.38 / 0.38 = 3.63 probes at most; a loss rises by 0.5 where 0.1 may."""
    request = finished.request()
    composition, targets, ids = np.array(request.composition), np.ones(3, dtype=np.int64), np.arange(3)
    problem = Problem(
        composition,
        np.array(list(CURRENT.values())),
        reference=np.full(3, 2.0),
        max_increase=np.full(3, 0.1),
        domains=DOMAINS,
        losses=DOMAINS,
    )
    base = Evaluations(np.full((1, 3), 2.0), None, targets, ids, 3)
    landed = Evaluations(np.array([[2.5, 1.0, 1.0]]), None, targets, ids, 3)
    u = np.full(4, 0.25)
    landing = Proposal(u, u @ composition, landed.losses.loss[0], 1.5, 0.0, "measured")
    outcome = Outcome(
        request=request,
        settings=ProposalConfig(),
        problem=problem,
        result=SearchResult(None, landing, 1, "done"),
        observations=Observations(np.stack([np.eye(4)[0], u]), np.array([[1.9] * 3, [2.5, 1.0, 1.0]])),
        measured=landed,
        base=base,
        alone=base,
        stay=base,
        landed=landed,
        sampled=None,
        bars=None,
        optimism=None,
        horizon_tokens=1,
        costs={},
    )
    bound, averaging = proposal_record(outcome).warnings
    better = Observations(np.eye(4)[:1], np.array([[1.4] * 3]))
    first, *others = proposal_record(dataclasses.replace(outcome, observations=better)).warnings
    assert others == [bound, averaging]
    assert first.startswith("simulated at the proposal, the objective is ")
    assert "above candidate 0's: the laws are wrong here" in first
    assert bound == (
        f"simulated at the proposal, a bound does not hold: loss of {DOMAINS[0]} rises by 0.5, "
        "max_increase allows 0.1"
    )
    assert averaging.startswith(
        "the proposal mixes 4 probes in effect, the current mixture can be reached with 3.63"
    )


EAGER = {"count": 7, "samples_per_domain": 8, "joint": 3, "batch_size": 4, "early_stop": 0.51}


@pytest.fixture(scope="module")
def stopped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchDir:
    """A search that stops candidates at the slightest doubt."""
    return searched(tiny_data, tmp_path_factory.mktemp("stopped") / "run", candidates=EAGER)


def test_candidates_that_are_stopped_are_told_and_paid_for_as_such(stopped: SearchDir) -> None:
    rows = pq.read_table(stopped.candidates_file).to_pylist()
    tokens = {
        kind: [row["tokens"] for row in rows if row["kind"] == kind] for kind in ("candidate", "snapshot")
    }
    in_full, by_candidate = tokens["snapshot"], np.array(tokens["candidate"]).reshape(7, 3)
    seen = by_candidate.sum(axis=1) / sum(in_full)
    assert seen[0] == 1, "staying is what the others are compared with"
    assert (seen < 1).any(), "nothing was stopped: this shows nothing"
    assert (by_candidate > 0).all()
    stderr = np.array([row["stderr_change"] for row in rows if row["kind"] == "candidate"]).reshape(7, 3)
    assert (stderr > 0).all()
    # 8 x 3 samples of 64 tokens; snapshot, staying like the proposal and the proposal in full
    samples = round(24 * seen.sum()) + 3 * 24
    cost = stopped.proposal().costs["evaluation"]
    assert cost.tokens == samples * 64
    flops = count_flops(tiny_llama(vocab_size=512), 64, 2).lowrank_candidate(4)
    assert cost.flops == pytest.approx(cost.tokens * flops)


@pytest.mark.parametrize("calls", [2, 4])
def test_a_search_that_stops_candidates_goes_on_to_the_same_proposal(
    stopped: SearchDir, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed in the first or the second group of candidates; the plan is read again, not made again."""
    config = quick_config(tiny_data, tmp_path / "run", candidates=EAGER)
    search = request(config)
    evaluated = answer_killed(config, search, calls)
    assert len(list(search.evaluations.iterdir())) == sum(evaluated)
    monkeypatch.setattr(Planner, "_decided", lambda planner: pytest.fail("decided twice"))
    answer(config, search)
    assert lasting(search) == lasting(stopped)
    ours, theirs = search.proposal().costs["evaluation"], stopped.proposal().costs["evaluation"]
    assert (ours.tokens, ours.flops) == (theirs.tokens, theirs.flops), "of all attempts"


def test_progress_counts_samples_and_ends_where_it_was_said_to(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick_config(tiny_data, tmp_path / "run", candidates=EAGER)
    search, done = request(config), []
    enter, advance = StatusWriter.enter, StatusWriter.advance

    def entered(self: StatusWriter, stage: SearchStage, *, total: int = 0, reason: str = "") -> None:
        done.append((stage, total, 0))
        enter(self, stage, total=total, reason=reason)

    def advanced(self: StatusWriter, count: int) -> None:
        done.append((*done[-1][:2], count))
        advance(self, count)

    monkeypatch.setattr(StatusWriter, "enter", entered)
    monkeypatch.setattr(StatusWriter, "advance", advanced)
    answer(config, search)
    counts = [(total, count) for stage, total, count in done if stage is SearchStage.EVALUATING]
    assert {total for total, _ in counts} == {(7 + 5) * 24}
    assert [count for _, count in counts] == sorted(count for _, count in counts)
    # snapshot; staying, which is read again as a candidate and in the end; six others; staying like the
    # proposal, and the proposal
    assert counts[-1] == ((7 + 5) * 24, (1 + 3 + 6 + 1 + 1) * 24)
    assert len(counts) > 30, "more often than once for each candidate"


def test_running_out_of_memory_begins_the_evaluation_again_with_smaller_passes(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = {"samples_per_domain": 8, "joint": 2, "batch_size": 8}
    config = quick_config(tiny_data, tmp_path / "run", candidates=candidates)
    search = request(config)
    simulate = evaluating.simulate_sums

    def short_of_memory(adapters: Any, U: np.ndarray, *rest: Any, **options: Any) -> Simulated:
        if len(U) * options["batch_size"] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return simulate(adapters, U, *rest, **options)

    monkeypatch.setattr(evaluating, "simulate_sums", short_of_memory)
    answer(config, search)
    assert read_record(search.plan_file, EvaluationPlan).batch_size == 4
    assert "begins again with 2 candidates of 4 samples in a pass" in caplog.text
    small = searched(tiny_data, tmp_path / "small", candidates={**candidates, "batch_size": 4})
    assert lasting(search) == lasting(small)


def test_a_search_with_kernels_finds_what_one_in_plain_torch_finds(tiny_data: Path, tmp_path: Path) -> None:
    """In Triton's interpreter: probes, candidates and the fused LM head."""
    tiny = {
        "probes": {"steps": 2, "batch_size": 1, "rank": 2, "dropout": 0.0},
        "candidates": {"count": 3, "samples_per_domain": 1, "joint": 3, "method": "lowrank"},
        "proposal": {"bootstrap": 0},
    }
    found = [
        searched(tiny_data, tmp_path / kernels, kernels=kernels, **tiny) for kernels in ("torch", "triton")
    ]
    plain, fast = (search.proposal() for search in found)
    assert [read_record(search.plan_file, EvaluationPlan).kernels for search in found] == [False, True]
    assert fast.simulated == pytest.approx(plain.simulated, rel=1e-5)
    assert fast.weights == pytest.approx(plain.weights, abs=1e-3)
    assert fast.simulated != plain.simulated, "nothing was computed otherwise"


def test_a_search_that_can_stop_nothing_early_says_so(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"count": 2, "samples_per_domain": 2, "early_stop": 0.9}
    searched(tiny_data, tmp_path / "run", candidates=few)
    assert "early_stop stops nothing: of 6 held-out samples" in caplog.text
