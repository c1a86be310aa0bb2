"""A rank that hangs ends itself, says where, and is started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opmix_dist import hang
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.faults import points
from opmix_dist.hang import EXIT_STATUS, HangGuard
from tests.train.jobs import STEPS, curve, tiny_config

LIMIT_S = 0.2


@contextmanager
def guarded(folder: Path) -> Iterator[tuple[HangGuard, list[int]]]:
    """A guard, and the statuses with which it has ended its process, which lives on."""
    ends: list[int] = []
    guard = HangGuard("trainer", 3, LIMIT_S, folder, end=ends.append)
    try:
        yield guard, ends
    finally:
        guard.close()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_place_without_progress_ends_the_process_with_the_stacks_of_all_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stuck = threading.Event()

    def a_reader_that_waits() -> None:
        stuck.wait()

    reader = threading.Thread(target=a_reader_that_waits)
    reader.start()
    with guarded(tmp_path / "hangs") as (guard, ends):
        for step in (6, 7):  # the second time is the short one
            guard.enter("reading data", step)
        wait(lambda: ends)
        assert ends == [EXIT_STATUS]
    stuck.set()
    reader.join()
    (file,) = (tmp_path / "hangs").iterdir()
    assert file.name.startswith("trainer_3_")
    for text in (file.read_text(), capfd.readouterr().err):
        assert "trainer rank 3 hangs: step 7 (reading data) without progress for 0.2 s" in text
        assert "train.hang_timeout_s" in text
        assert "a_reader_that_waits" in text
        assert "test_a_place_without_progress" in text, "the main thread too"


def test_progress_and_places_that_are_long_by_nature_are_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang, "LONG", 1e6)
    with guarded(tmp_path) as (guard, ends):
        for phase in ("training", "evaluation", "checkpoint"):  # the first time of each
            guard.enter(phase, 0)
            time.sleep(2 * LIMIT_S)
        guard.enter("evaluation", 1)
        time.sleep(2 * LIMIT_S)
        guard.enter("training", 1)
        for _ in range(20):
            time.sleep(LIMIT_S / 8)
            guard.move()
        assert not ends
        time.sleep(2 * LIMIT_S)
        wait(lambda: ends)


def test_work_beside_must_end_though_the_main_thread_goes_on(tmp_path: Path) -> None:
    with guarded(tmp_path) as (guard, ends):
        done = guard.beside("writing a checkpoint")
        done()
        guard.beside("writing a snapshot")
        end = time.monotonic() + 20
        while not ends:
            guard.enter("training", 5)
            guard.move()
            time.sleep(LIMIT_S / 8)
            assert time.monotonic() < end
    (file,) = tmp_path.iterdir()
    assert "writing a snapshot without progress for 0.8 s" in file.read_text()


def test_what_is_waited_for_is_named_not_who_waits(tmp_path: Path) -> None:
    with guarded(tmp_path) as (guard, ends):
        guard.beside("writing a checkpoint")
        guard.enter("checkpoint", 6)  # within the same beat, and as long a place
        wait(lambda: ends)
    (file,) = tmp_path.iterdir()
    assert "writing a checkpoint without progress" in file.read_text()


def test_time_in_which_the_process_does_not_run_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clocks jump as they do over a SIGSTOP and a SIGCONT."""
    jump = 0.0
    real = time.monotonic
    monkeypatch.setattr(hang.time, "monotonic", lambda: real() + jump)
    with guarded(tmp_path) as (guard, ends):
        guard.enter("training", 0)
        guard.enter("training", 1)
        jump = 1e6
        until = real() + 3 * LIMIT_S
        while real() < until:
            guard.move()
            time.sleep(LIMIT_S / 8)
        assert not ends
        wait(lambda: ends)


def test_a_folder_that_cannot_be_written_does_not_keep_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with guarded(tmp_path / "file" / "hangs") as (guard, ends):
        guard.enter("training", 0)
        guard.enter("training", 1)
        wait(lambda: ends)
    assert f"{tmp_path}/file/hangs/trainer_3_" in capfd.readouterr().err


def start(config: dict[str, Any], plan: str, log: str) -> None:
    """In a process of its own: the run, as ``opmix train`` starts it."""
    from opmix_dist.config import check_config
    from opmix_dist.train.roles import run_job

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.environ[points.PLAN_VARIABLE] = plan
    run_job(check_config(config))


@pytest.mark.launch
def test_a_lone_rank_that_hangs_is_ended_and_a_resume_ends_the_run(tiny_data: Path, tmp_path: Path) -> None:
    """In a step, and in the thread that writes a checkpoint. The imports are made once, for all starts."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["opmix_dist.train.job"])
    runs = {}
    for name, faults in {
        "whole": [],
        "hung": [
            {"id": "step", "point": "train.step", "kind": "hang", "step": 7},
            {"id": "write", "point": "checkpoint.write", "kind": "hang", "detail": ""},
        ],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        runs[name] = RunDir(folder / "run")
        config = tiny_config(
            tiny_data,
            runs[name].path,
            pool={"ranks": 0},
            mixture={"policy": "static"},
            train={"hang_timeout_s": 2.0},
        )
        plan = folder / "plan.json"
        plan.write_text(json.dumps({"fired": str(folder / "fired"), "faults": faults}))
        codes = []
        while len(codes) < 4 and 0 not in codes:
            process = processes.Process(target=start, args=(config, str(plan), str(folder / "log")))
            process.start()
            process.join(120)
            codes.append(process.exitcode)
        assert codes == [EXIT_STATUS] * len(faults) + [0], (folder / "log").read_text()[-4000:]
        assert {mark.stem for mark in (folder / "fired").glob("*")} == {fault["id"] for fault in faults}
    assert len(runs["whole"].train_lines()) == STEPS
    assert curve(runs["hung"]) == curve(runs["whole"])
    stacks = sorted(file.read_text() for file in runs["hung"].hangs.iterdir())
    assert len(stacks) == 2
    assert any("step 7 (mixture)" in text and "_train_step" in text for text in stacks)
    assert any("checkpoints/step_3 without progress" in text and "write_data" in text for text in stacks)
    assert not runs["whole"].hangs.exists()
