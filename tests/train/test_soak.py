"""A soak of one job: faults of trainers, pool and checkpoints, and a run that ends as if there were none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.soak.drawing import INGEST, KINDS, Episode, draw_ingest, draw_job
from benchmarks.soak.episodes import Soak
from opmix_dist.faults.plan import Fault
from tests.helpers import ROOT


def fault(name: str, point: str, kind: str, **where: int | str) -> Fault:
    return Fault.model_validate({"id": name, "point": point, "kind": kind, **where})


@pytest.mark.launch
def test_a_job_with_faults_ends_as_the_job_without(tiny_data: Path, tmp_path: Path) -> None:
    """In turn: the second trainer is killed in a checkpoint of step 3, the pool's worker hangs in a probe, a
    checkpoint finds the disk full, and the second trainer hangs before step 8."""
    faults = (
        fault("killed", "checkpoint.write", "crash", rank=1),
        fault("pool_hangs", "search.probing", "hang", role="pool", step=4),
        fault("disk_full", "checkpoint.complete", "oserror", step=6),
        fault("hangs", "train.step", "hang", rank=1, step=8),
    )
    soak = Soak(tmp_path, tiny_data, patience_s=16.0)
    outcome = soak.job(Episode(0, 2, 1, faults, dict.fromkeys([f.id for f in faults], "any")))
    logs = [file.read_text() for file in sorted((tmp_path / "job_0").glob("launch_*.log"))]
    assert outcome.problems == [], "\n".join(logs)[-6000:]
    assert outcome.fired == 4
    assert [start.fired for start in outcome.starts] == [
        ["killed"],
        ["pool_hangs", "disk_full", "hangs"],
        [],
    ]
    assert not any(start.killed_as_hung for start in outcome.starts), "the job's own watchdogs noticed"
    assert outcome.starts[2].first_step == 3, "what the checkpoint of step 6 could not hold is done again"
    first, second, _ = logs
    assert "pool worker 0 is killed: the pool hangs" in second
    assert "the checkpoint of step 6 could not be written" in second
    assert re.search(r"trainer rank . (\(|has not moved).*; rank 1 at step 8 \(mixture\)", second)
    assert "rank 1 without a sign of life" in first


def test_what_is_drawn_can_happen_and_covers_all() -> None:
    """No two searches' failures hide each other, nobody hangs alone; and the same seed draws the same."""
    episodes = [draw_job(0, number, 4) for number in range(24)]
    assert episodes == [draw_job(0, number, 4) for number in range(24)]
    kinds = {fault.kind for episode in episodes for fault in episode.faults}
    assert kinds == {*KINDS, "nan"}
    for episode in episodes:
        assert len(set(episode.ids)) == len(episode.ids) == 4
        failing = [
            one
            for one in episode.faults
            if episode.phases[one.id] in ("snapshot", "probe", "evaluation")
            and one.kind in ("exception", "oserror")
        ]
        searching = [
            one
            for one in episode.faults
            if episode.phases[one.id] in ("snapshot", "probe", "evaluation", "fit", "proposal")
        ]
        assert not failing or len(searching) == 1
        assert episode.trainers > 1 or "hang" not in {one.kind for one in episode.faults}
    assert [one.point for one in draw_ingest(0, 0).faults] == [spot.point for spot in INGEST]
    assert (ROOT / "Makefile").read_text().count("-m benchmarks.soak") == 1
