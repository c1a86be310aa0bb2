"""Checkpoints that are damaged, that find no room, whose writers are killed: real saves of real engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, hash_file
from opmix_dist.exchange.rundir import read_record
from tests.helpers import ROOT, on_ranks

pytestmark = pytest.mark.launch
ROUNDS = 25


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Mount point of a file system of 16 MiB; "" where nothing may be mounted."""
    point = str(tmp_path_factory.mktemp("disk"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", point]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield ""
        return
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.fixture(scope="module")
def out(small_disk: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    on_ranks(2, "tests.train.checkpoint_ranks", str(folder), small_disk)
    return folder


@pytest.fixture
def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "found_0.json").read_text())


def test_the_newest_and_every_fourth_are_kept(found: dict[str, Any]) -> None:
    assert found["kept and damaged"]["kept"] == [4, 6, 7]


def test_the_manifest_has_every_file_as_it_is(out: Path) -> None:
    marker = read_record(out / "whole" / files.COMPLETE, CheckpointMarker)
    there = {path.name: hash_file(path) for path in (out / "whole").iterdir() if path.name != files.COMPLETE}
    assert marker.files == there
    assert set(there) == {".metadata", "__0_0.distcp", "__1_0.distcp", "trainer.json"}


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_resumed(found: dict[str, Any]) -> None:
    case = found["kept and damaged"]
    assert case["by sizes"] == 7, "sizes alone cannot tell that a bit has changed"
    assert case["resumed"] == [4, True]
    assert (case["left"], case["set aside"]) == ([4], [6, 7])
    flipped, cut, lost = case["messages"]
    assert re.search("step 7 is damaged .*__1_0.distcp holds other bytes than were written", flipped)
    assert re.search("step 6 is damaged .*.metadata has 100 bytes and not the", cut)
    assert lost == "going on from step 4: at least 3 steps are lost and done again"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(out: Path) -> None:
    for rank in (0, 1):
        case = json.loads((out / f"found_{rank}.json").read_text())["kept and damaged"]
        assert re.search("step 4: .*trainer.json is missing", case["all damaged"])
    assert (out / "kept" / "checkpoints" / "step_4").is_dir()


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(found: dict[str, Any], small_disk: str) -> None:
    if not small_disk:
        pytest.skip("no file system can be mounted here")
    case = found["full disk"]
    assert case["first"] == case["while full"] == [1]
    assert case["folders"] == ["step_1"], "the half-written ones are gone"
    assert case["given back"]
    assert [message.split(" could")[0] for message in case["messages"]] == [
        "the checkpoint of step 2",
        "the checkpoint of step 3",
    ]
    assert all("No space left on device" in message for message in case["messages"])
    assert case["resumed"] == [1, True]
    assert case["with room again"] == [1, 4]
    assert (case["lines while full"], case["lines"]) == (0, [10_000, 0, 0])


def test_one_rank_that_cannot_write_fails_the_save_on_all(found: dict[str, Any]) -> None:
    case = found["one rank"]
    assert case["first"] == case["while limited"] == [1]
    assert case["folders"] == ["step_1"]
    assert case["messages"] == [
        "the checkpoint of step 2 could not be written and is removed: rank 1: [Errno 27] File too large"
    ]
    assert (case["without limit"], case["resumed"]) == ([1, 3], [3, True])


def test_a_killed_save_leaves_the_one_before_it_or_a_whole_one(tmp_path: Path) -> None:
    """Each child resumes from what the killed one left and compares it with what was saved."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed_saves", str(tmp_path), str(ROUNDS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert 0 < last["cut off"] < ROUNDS, "kills must hit saves, and some must come after their end"
