"""Files that are whole or absent, and readers that refuse what is neither."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.exchange.schemas import MixtureRecord, Proposal, SearchRequest, SearchStage, SearchStatus
from opmix_dist.process import lock_run


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """A process that rewrites a file without pause is killed many times; every read is whole."""
    path = tmp_path / "value.json"
    files.write_json(path, {"n": -1, "pad": "x" * 10_000})
    code = (
        "import sys; from pathlib import Path; from opmix_dist.exchange import files\n"
        "n = 0\nwhile True:\n files.write_json(Path(sys.argv[1]), {'n': n, 'pad': 'x' * 10_000}); n += 1"
    )
    seen = set()
    for _ in range(4):
        files.write_json(path, {"n": -1, "pad": "x" * 10_000})
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        begun, late = None, time.monotonic() + 60
        while begun is None or time.monotonic() < begun + 0.3:
            value = files.read_json(path)
            assert len(value["pad"]) == 10_000
            seen.add(value["n"])
            if begun is None and value["n"] >= 0:
                begun = time.monotonic()
            assert begun or time.monotonic() < late, "the writer never got to write"
        writer.kill()
        writer.wait()
        assert len(files.read_json(path)["pad"]) == 10_000
    assert len(seen) > 5


def test_failed_write_keeps_the_old_file_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, math.nan)
    assert files.read_json(path) == 1
    assert os.listdir(tmp_path) == ["value.json"]


def test_torn_last_line_is_dropped_and_a_torn_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert files.read_jsonl(path) == []
    files.append_jsonl(path, {"a": 1})
    files.append_jsonl(path, {"a": 2})
    with open(path, "ab") as file:
        file.write(b'{"a": 3')
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    files.append_jsonl(path, {"a": 4})
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 4}], "written onto the torn line"
    path.write_bytes(b'{"a": 1')
    files.append_jsonl(path, {"a": 5})
    assert files.read_jsonl(path) == [{"a": 5}]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"lines.jsonl:2 is not valid JSON"):
        files.read_jsonl(path)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"opmix_fuzz_{os.getpid()}.json"
    path.write_bytes(data)
    try:
        for kind in (SearchRequest, SearchStatus, Proposal, MixtureRecord):
            with pytest.raises(UserError, match=str(path)):
                read_record(path, kind)
    finally:
        path.unlink()


def test_incomplete_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="snapshot .*step_3 has no COMPLETE.json"):
        files.require_complete(tmp_path / "step_3", "snapshot")
    files.mark_complete(tmp_path / "step_3", {"step": 3})
    assert files.require_complete(tmp_path / "step_3", "snapshot") == {"step": 3}


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 0.6, "b": 0.6}, "sum to 1"), ({"a": 1.5, "b": -0.5}, "not negative"), ({"../a": 1.0}, "pattern")],
)
def test_a_mixture_is_on_the_simplex_and_its_names_are_safe(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureRecord(version=0, step=0, weights=weights, why="")


def test_request_shapes_are_checked(tmp_path: Path) -> None:
    good = {
        "search": "0001", "step": 3, "snapshot": "snapshots/step_3", "components": ["old", "a"],
        "domains": ["a", "b"], "composition": [[0.5, 0.5], [0.95, 0.05]], "current": {"a": 0.5, "b": 0.5},
        "prior": {"a": 0.5, "b": 0.5}, "base_lr": 1e-3, "seed": 0,
    }  # fmt: skip
    write_record(tmp_path / "request.json", SearchRequest.model_validate(good))
    assert read_record(tmp_path / "request.json", SearchRequest).components == ["old", "a"]
    for change in ({"composition": [[1.0, 0.0]]}, {"caps": [1.0]}, {"domains": ["a", "a"]}, {"extra": 1}):
        (tmp_path / "request.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="request.json is not a valid SearchRequest"):
            read_record(tmp_path / "request.json", SearchRequest)


def test_a_proposal_speaks_of_the_same_domains_throughout() -> None:
    losses = {"a": 1.0, "b": 2.0}
    good = {
        "search": "0001", "step": 3, "coefficients": {"old": 1.0}, "weights": {"a": 0.5, "b": 0.5},
        "current": {"a": 0.5, "b": 0.5}, "predicted": losses, "simulated": losses, "snapshot": losses,
        "predicted_current": losses, "simulated_current": losses, "objective": 1.0, "kl": 0.0,
        "horizon_tokens": 1, "costs": {},
    }  # fmt: skip
    Proposal.model_validate(good)
    with pytest.raises(ValueError, match="predicted must name the same domains as weights"):
        Proposal.model_validate(good | {"predicted": {"a": 1.0}})
    with pytest.raises(ValueError, match="finite"):
        Proposal.model_validate(good | {"predicted": {"a": 1.0, "b": float("nan")}})


def test_only_finished_checkpoints_and_requested_searches_are_found(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.complete_checkpoints() == [] == run.search_dirs()
    for step in (30, 4, 100):
        files.mark_complete(run.checkpoint(step), {"step": step})
    run.checkpoint(200).mkdir()
    (run.checkpoints / "step_x").mkdir()
    assert run.complete_checkpoints() == [4, 30, 100]
    assert run.incomplete_checkpoints() == [run.checkpoint(200)]
    (run.searches / "0001").mkdir(parents=True)
    assert run.search_dirs() == []
    files.write_json(run.search("0001").request_file, {})
    assert [search.name for search in run.search_dirs()] == ["0001"]


def test_a_step_that_was_decided_twice_counts_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for version, step in ((0, 0), (1, 8), (1, 8)):
        record = MixtureRecord(version=version, step=step, weights={"a": 1.0}, why="")
        files.append_jsonl(run.mixtures_file, record.model_dump())
    assert [(r.version, r.step) for r in run.mixtures()] == [(0, 0), (1, 8)]


def test_a_run_directory_has_one_owner(tmp_path: Path) -> None:
    held = lock_run(tmp_path)
    with pytest.raises(UserError, match=f"in use by another run .*pid {os.getpid()}"):
        lock_run(tmp_path)
    held.close()
    lock_run(tmp_path).close()


def test_final_stages() -> None:
    assert [stage for stage in SearchStage if stage.final] == [SearchStage.PROPOSED, SearchStage.FAILED]


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """What it leads to would be emptied, and hold a process number then."""
    victim = tmp_path / "victim"
    victim.write_text("dear")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock is no ordinary file"):
        lock_run(tmp_path / "run")
    assert victim.read_text() == "dear"
