"""`opmix top` on run directories in every state that a person may meet."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from opmix_dist.cli import main
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import BadStep, PhaseCost, SearchStage, SearchStatus, Stopped
from opmix_dist.observe.concerns import concerns
from opmix_dist.observe.glance import Glance, glance
from opmix_dist.observe.screen import Screen
from tests.helpers import ROOT
from tests.report.runs import PROPOSED, STEPS, UNIFORM, RunWriter


def shown(seen: Glance, screen: Screen | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print((screen or Screen()).draw(seen))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    """A run in progress: step 60 of 100, a new mixture since step 40."""
    writer = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "initial mixture")
    writer.mixture(40, PROPOSED, "mixture.schedule").training(60).evaluation(50, [4.0, 1.8, 4.1])
    return writer


def age(path: Path, seconds: float) -> None:
    """As if ``path`` had been written so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def searching(writer: RunWriter, done: int, total: int, stage: str = "evaluating") -> SearchDir:
    search = writer.request()
    files.write_json(search.plan_file, {})
    write_record(search.status_file, SearchStatus(stage=SearchStage(stage), done=done, total=total))
    return search


def test_a_run_in_progress(writer: RunWriter) -> None:
    (writer.run.checkpoint(50)).mkdir(parents=True)
    files.mark_complete(writer.run.checkpoint(50), {})
    (writer.run.checkpoint(60)).mkdir()
    seen = glance(writer.run)
    assert seen.step == 60
    assert seen.checkpoint is not None
    assert seen.checkpoint.step == 50
    text = shown(seen)
    # 1,000 tokens a step at 10,000 a second: 40 steps take 4 s
    for expected in (
        "training",
        "step 60 of 100, 4.0 s left",
        "3.1000",
        "10 k tokens/s",
        "60 k",
        "step 50, ",
    ):
        assert expected in text, text
    rows = [line.split() for line in text.splitlines() if " code " in line]
    assert [rows[0][-4], rows[0][-3], rows[0][-2]] == ["+16.7", "3.1000", "1.8000"]
    assert "version 1 since step 40: mixture.schedule" in text
    assert "40.0%" in text  # MFU
    assert "warnings" not in text


def test_mfu_of_lines_that_have_it(writer: RunWriter) -> None:
    rows = [row | {"mfu": None} for row in files.read_jsonl(writer.run.train_file)]
    files.rewrite_jsonl(writer.run.train_file, rows)
    assert "no known peak" in shown(glance(writer.run))
    for row, mfu in zip(rows[-2:], (0.4, 0.42), strict=True):
        row |= {"mfu": mfu, "memory": {"of": "another version"}}
    files.rewrite_jsonl(writer.run.train_file, rows)
    text = shown(glance(writer.run))
    assert "41.0%" in text
    assert "warnings" not in text


def test_a_torn_line_is_not_shown(writer: RunWriter) -> None:
    with open(writer.run.train_file, "ab") as file:
        file.write(b'{"step": 61, "lo')
    seen = glance(writer.run)
    assert seen.step == 60
    assert seen.problems == []


def test_the_time_that_a_search_still_takes(writer: RunWriter) -> None:
    """At first by the files' times: 3 pieces in 30 s, so 90 s for 9 more. Then by what is seen: 2 in 4 s."""
    search = searching(writer, 3, 12)
    age(search.plan_file, 130)
    age(search.status_file, 100)
    seen, screen = glance(writer.run), Screen()
    assert "3 of 12, 2 min left" in shown(seen, screen)
    assert "last sign of life  2 min ago" in shown(seen)
    write_record(search.status_file, SearchStatus(stage=SearchStage.EVALUATING, done=5, total=12))
    later = glance(writer.run)
    later.now = seen.now + 4
    assert "5 of 12, 14 s left" in shown(later, screen)


@pytest.mark.parametrize("external", [False, True])
def test_a_pool_that_fell_silent(tmp_path: Path, external: bool) -> None:
    writer = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "initial mixture").training(30)
    config = writer.run.config()
    pool = config.pool.model_copy(update={"external": external, "ranks": 0 if external else 1})
    writer.run.write_config(config.model_copy(update={"pool": pool}))
    search = searching(writer, 3, 12, "probing")
    age(search.status_file, 299)
    assert concerns(glance(writer.run)) == []
    age(search.status_file, 400)
    [text] = concerns(glance(writer.run))
    assert text == "search 0001: no sign of life for 7 min (pool.heartbeat_timeout_s is 300)"
    search.status_file.unlink()
    age(search.request_file, 400)
    [text] = concerns(glance(writer.run))
    assert text.startswith("search 0001: the pool has not begun for 7 min")


def test_a_search_that_failed_and_one_that_was_given_up(writer: RunWriter) -> None:
    search = writer.request()
    write_record(search.status_file, SearchStatus(stage=SearchStage.FAILED, reason="out of memory"))
    assert concerns(glance(writer.run)) == ["search 0001 failed, the mixture stays: out of memory"]
    searching(writer, 3, 12)
    why = "search 0001 failed: the pool gave no sign of life for 301 s"
    writer.mixture(50, PROPOSED, why, search="0001")
    assert concerns(glance(writer.run)) == [why]
    assert "left" not in shown(glance(writer.run)).split("─ search 0001 ─")[1]


def test_a_run_without_steps_for_long_is_quiet_unless_it_waits(writer: RunWriter) -> None:
    age(writer.run.train_file, 50)
    assert concerns(glance(writer.run)) == []
    age(writer.run.train_file, 100)
    assert concerns(glance(writer.run)) == ["no step for 2 min, where a step takes 0.1 s"]
    assert "quiet" in shown(glance(writer.run))
    searching(writer, 3, 12)  # synchronous: the trainers wait
    assert concerns(glance(writer.run)) == []
    assert "waits for the search" in shown(glance(writer.run))


def test_a_leader_that_is_gone(writer: RunWriter) -> None:
    lock = writer.run.path / ".lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(f"pid {gone.pid} on {os.uname().nodename}\n")
    [text] = concerns(glance(writer.run))
    assert "is gone: start the run again" in text
    assert "not running" in shown(glance(writer.run))
    lock.write_text(f"pid {os.getpid()} on {os.uname().nodename}\n")
    assert concerns(glance(writer.run)) == []
    lock.write_text(f"pid {gone.pid} on another-host\n")  # nothing is known of its processes
    assert concerns(glance(writer.run)) == []


def test_numbers_that_are_none_and_checkpoints_that_fail(writer: RunWriter) -> None:
    rows = files.read_jsonl(writer.run.train_file)
    text = b"".join(
        b'{"step": %d, "loss": NaN, "tokens": 1, "tokens_per_second": 1, "lr": 1, "grad_norm": 1}\n' % step
        for step in (61, 62)
    )
    with open(writer.run.train_file, "ab") as file:
        file.write(text)
    assert rows[-1]["step"] == 60
    config = writer.run.config()
    frequent = config.checkpoint.model_copy(update={"interval_steps": 10})
    writer.run.write_config(config.model_copy(update={"checkpoint": frequent}))
    writer.run.damaged_checkpoint(30).mkdir(parents=True)
    assert concerns(glance(writer.run)) == [
        "loss or gradient norm not finite in 2 recent step(s), last in step 62",
        "checkpoints of these steps were set aside as damaged: 30",
        "no checkpoint for 62 steps (there is none; checkpoint.interval_steps is 10)",
    ]


def test_a_finished_run_and_one_that_was_stopped(writer: RunWriter) -> None:
    stopped = Stopped(step=60, checkpoint=50, signal="SIGTERM", at="2026-01-01T00:00:00+00:00")
    write_record(writer.run.stopped_file, stopped)
    age(writer.run.train_file, 1e6)
    seen = glance(writer.run)
    assert seen.ended
    assert concerns(seen) == [stopped.text]
    assert "left" not in shown(seen)
    writer.run.stopped_file.unlink()
    writer.training().summary([3.5, 1.5, 4.0], {"train": PhaseCost()})
    seen = glance(writer.run)
    assert seen.ended
    assert concerns(seen) == []
    text = shown(seen)
    assert "finished" in text
    assert f"step {STEPS} of {STEPS}" in text


def test_what_is_missing_or_nonsense_is_said_and_the_rest_is_shown(writer: RunWriter) -> None:
    writer.run.config_file.write_text("train: [")
    writer.run.mixtures_file.write_text("nonsense\n")
    search = writer.request()
    search.status_file.write_text('{"stage": "dreaming"}')
    seen = glance(writer.run)
    assert len(seen.problems) == 3
    text = shown(seen)
    assert "mixtures.jsonl:1 is not valid JSON" in text
    assert "10 k tokens/s" in text
    writer.run.config_file.unlink()
    assert any("no config.yaml yet" in problem for problem in glance(writer.run).problems)


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    assert "not begun" in shown(glance(RunDir(tmp_path)))
    with pytest.raises(UserError, match="nowhere is no folder"):
        glance(RunDir(tmp_path / "nowhere"))


def test_text_of_a_run_directory_does_not_drive_the_terminal(writer: RunWriter) -> None:
    writer.mixture(50, UNIFORM, "[bold red]big[/]\x1b[2J\u202ereversed\r\n\x07" + "x" * 5000)
    (writer.run.path / ".lock").write_bytes(b"\x1b]0;title\x07\xff" * 1000)
    reason = "\x1b[1;31mnever\u202e\x9b2J" + "y" * 2000
    search = writer.request()
    write_record(search.status_file, SearchStatus(stage=SearchStage.FAILED, reason=reason))
    text = shown(glance(writer.run))
    assert "[bold red]big[/]\\x1b[2J" in text
    assert "\\x1b[1;31mnever\\u202e\\x9b2J" in text
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    assert len(text) < 10_000


def test_watching_changes_nothing(
    writer: RunWriter, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        found = sorted(writer.run.path.rglob("*"))
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in found}

    searching(writer, 3, 12)
    before = state()
    assert main(["top", str(writer.run.path), "--once"]) == 0
    assert "step 60 of 100" in capsys.readouterr().out
    picture = tmp_path / "top.svg"
    assert main(["top", str(writer.run.path), "--svg", str(picture)]) == 0
    svg = picture.read_text()
    assert svg.startswith("<svg")
    assert not re.search(r'href|src:|\("http', svg)  # nothing is fetched
    assert capsys.readouterr().out == ""
    assert state() == before
    assert main(["top", str(writer.run.path / "nowhere")]) == 2


def test_a_run_is_watched_in_a_terminal_until_it_ends(writer: RunWriter) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "opmix_dist.cli", "top", str(writer.run.path), "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    watcher = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT, start_new_session=True
    )
    os.close(theirs)
    output = b""

    def read_until(text: bytes) -> None:
        nonlocal output
        end = time.monotonic() + 120
        while text not in output:
            assert time.monotonic() < end, output
            output += os.read(ours, 1 << 16)

    try:
        read_until(b"60 of 100")
        writer.training().summary([3.5, 1.5, 4.0], {"train": PhaseCost()})
        read_until(b"100 of 100")
        assert watcher.wait(60) == 0
    finally:
        watcher.kill()
        os.close(ours)


def bad(step: int, action: str, **more: object) -> BadStep:
    return BadStep(
        kind="nan", action=action, step=step, batch=step + 2, reason="the gradient norm is nan", at="2026",
        domain_loss={"web": 2.5, "code": None}, **more,
    )  # fmt: skip


def test_bad_steps_are_counted_and_the_last_one_is_told_while_it_is_recent(writer: RunWriter) -> None:
    for met in (
        bad(3, "skip"),
        bad(59, "rollback", checkpoint=50, loader={}, domain_tokens={"web": 1}),
    ):
        files.append_jsonl(writer.run.events_file, met.model_dump(mode="json"))
    seen = glance(writer.run)
    assert "2, last step 60 (batch 61): nan, rollback" in shown(seen)
    assert "step 60 was bad: the gradient norm is nan: the run went back to step 50" in concerns(seen)
    seen.lines = [line.model_copy(update={"step": line.step + 100}) for line in seen.lines]
    assert not any("was bad" in text for text in concerns(seen))
    assert "2, last step 60" in shown(seen)


def test_only_the_newest_of_very_many_bad_steps_are_read(
    writer: RunWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opmix_dist.observe.glance.MAX_EVENT_BYTES", 1000)
    for step in range(20):
        files.append_jsonl(writer.run.events_file, bad(step, "skip").model_dump(mode="json"))
    seen = glance(writer.run)
    assert 0 < len(seen.bad_steps) < 20
    assert f"{len(seen.bad_steps)} and more, last step 20" in shown(seen)


def test_a_rank_that_hung_is_told_with_the_file_of_its_stacks(writer: RunWriter) -> None:
    writer.run.hangs.mkdir()
    for name in ("trainer_0_20260102T000000Z.txt", "trainer_11_20260101T000000Z.txt", "\x1b[2J.txt"):
        (writer.run.hangs / name).touch()
    said = concerns(glance(writer.run))
    assert "a rank hung and ended itself 2 times; where it hung: hangs/trainer_0_20260102T000000Z.txt" in said
