"""`opmix checkpoints` on folders as saves, kills, disks and strangers leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opmix_dist.cli import main
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, hash_file
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.train.checkpoint_list import Listed, list_checkpoints
from opmix_dist.train.state import STATE_FILE, TrainerState

SHARD = "__0_0.distcp"


def save(folder: Path, step: int, *, manifest: bool = True) -> None:
    """What a save leaves, but for the tensors."""
    folder.mkdir(parents=True)
    (folder / SHARD).write_bytes(bytes(range(256)) * step)
    state = TrainerState(
        step=step, weights={"web": 1.0}, domain_tokens={"web": 7}, content={"web": "0"}, engine="FSDP2 of 4",
        world_size=4, global_batch_size=8,
    )  # fmt: skip
    write_record(folder / STATE_FILE, state)
    digests = {name: hash_file(folder / name) for name in (SHARD, STATE_FILE)}
    marker = CheckpointMarker(step=step, files=digests if manifest else None)
    files.mark_complete(folder, marker.model_dump(mode="json"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Steps 2 and 8 are whole, of 4 a byte is wrong, 6 is too short, 10 was never finished."""
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6, 8):
        save(run.checkpoint(step), step)
    content = bytearray((run.checkpoint(4) / SHARD).read_bytes())
    content[100] ^= 1
    (run.checkpoint(4) / SHARD).write_bytes(content)
    (run.checkpoint(6) / SHARD).write_bytes(b"short")
    run.checkpoint(10).mkdir()
    (run.checkpoint(10) / SHARD).write_bytes(b"1234")
    return run


def standings(found: list[Listed]) -> dict[int, str]:
    return {checkpoint.step: checkpoint.standing for checkpoint in found}


def test_sizes_tell_some_damage_and_checksums_all(run: RunDir) -> None:
    found = list_checkpoints(run)
    assert standings(found) == {2: "whole", 4: "whole", 6: "damaged", 8: "whole", 10: "unfinished"}
    found = list_checkpoints(run, checksums=True)
    assert standings(found) == {2: "whole", 4: "damaged", 6: "damaged", 8: "whole", 10: "unfinished"}
    first, flipped, short, _, unfinished = found
    assert (first.engine, first.ranks) == ("FSDP2 of 4", 4)
    assert first.bytes == sum(path.stat().st_size for path in run.checkpoint(2).iterdir())
    assert first.at == (run.checkpoint(2) / files.COMPLETE).stat().st_mtime
    assert flipped.why == f"{SHARD} holds other bytes than were written"
    assert short.why == f"{SHARD} has 5 bytes and not the {256 * 6} that were written"
    assert (unfinished.bytes, unfinished.why) == (4, "it has no COMPLETE.json")


def test_what_was_set_aside_is_listed_with_its_damage(run: RunDir) -> None:
    run.checkpoint(6).rename(run.damaged_checkpoint(6))
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(run)}
    assert found[6].standing == "set aside"
    assert "has 5 bytes" in found[6].why


def test_without_a_manifest_nothing_can_be_compared(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    save(run.checkpoint(3), 3, manifest=False)
    (found,) = list_checkpoints(run, checksums=True)
    assert (found.standing, found.has_manifest) == ("whole", False)


@pytest.mark.parametrize("content", [b"{", b'{"step": -1}', b'{"step": 2, "files": {"../../x": {}}}'])
def test_a_marker_that_is_none_is_damage(run: RunDir, content: bytes) -> None:
    (run.checkpoint(2) / files.COMPLETE).write_bytes(content)
    first, *_ = list_checkpoints(run)
    assert first.standing == "damaged"
    assert str(run.checkpoint(2) / files.COMPLETE) in first.why


def test_the_command_tells_a_person_and_a_program(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run.path)]) == 1
    out = capsys.readouterr().out
    assert "a resume goes on from step 8" in out
    assert "FSDP2 of 4 on 4 rank(s)" in out
    assert f"{SHARD} has 5 bytes" in out
    assert main(["checkpoints", str(run.path), "--checksums", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["standing"] for row in rows] == ["whole", "damaged", "damaged", "whole", "unfinished"]
    assert [row["compared"] for row in rows] == ["checksums"] * 4 + [""]
    for step in (4, 6):
        files.remove_folder(run.checkpoint(step))
    assert main(["checkpoints", str(run.path), "--checksums"]) == 0, "what is being written is no damage"


def test_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert "there is no checkpoint" in capsys.readouterr().out
    assert main(["checkpoints", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
