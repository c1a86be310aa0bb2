"""Lifecycles as a launch takes them: what is started, refused, shown, and what follows an attempt. Nothing is
trained here; tests/lifecycle/test_running.py launches one."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from opmix_dist.exchange.lifecycles import has_ended, stopped_in
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import Stopped
from opmix_dist.launch.records import Launch, LaunchDir, LocalProcess, now
from opmix_dist.lifecycle.config import LifecycleConfig, Stage, load_lifecycle, resolve
from opmix_dist.observe.follow import Follower
from tests.launch.test_commands import commands, directives, dry_run, opmix
from tests.lifecycle.test_config import lifecycle
from tests.lifecycle.test_running import ended

STOPPED = Stopped(step=3, checkpoint=3, signal="SIGUSR1", at="2026-01-01T00:00:00+00:00")


@pytest.fixture
def life(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three stages with a global batch of 4 and a micro-batch of 2: 1 or 2 trainer ranks."""
    monkeypatch.chdir(tmp_path)
    return written(lifecycle(tiny_data, pool={"ranks": 0}), "life")


def written(config: LifecycleConfig, name: str, **changes: Any) -> str:
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json") | changes))
    return str(file)


def stages(file: str) -> list[Stage]:
    return resolve(load_lifecycle(file))


def begun(stage: Stage) -> RunDir:
    """Leave what a stage does that has begun."""
    stage.run.write_config(stage.config)
    return stage.run


# --- what is started, and what is refused ---


def test_ranks_go_through_the_stages(life: str, tmp_path: Path, capsys) -> None:
    local = opmix(capsys, "launch", "local", life, "--ranks", "2", "--dry-run")
    assert local.rstrip().endswith(f"opmix_dist.cli lifecycle {tmp_path}/life/launch/config.yaml")
    script = dry_run(capsys, life, "--nodes", "2", "--stages.last.optimizer.lr", "1e-4")
    assert "--job-name=life" in directives(script)
    assert '\nTRAINED=("$RUN"/stages/pretrain "$RUN"/stages/midtrain "$RUN"/stages/last)\n' in script
    assert "\nCOMMAND=lifecycle\n" in script
    assert not (tmp_path / "life").exists()


def test_lifecycles_over_seeds_are_an_array(life: str, tiny_data: Path, tmp_path: Path, capsys) -> None:
    script = dry_run(capsys, life, "--vary", "seed=0,7", "--nodes", "1")
    runs = re.search(r"^RUNS=\((.*?)^\)", script, flags=re.MULTILINE | re.DOTALL)[1].split()
    assert runs == [f"{tmp_path}/life/seed_{seed}" for seed in (0, 7)]
    two = lifecycle(tiny_data, [{"name": "other", "joins": ["python"], "train": {"steps": 1}}])
    other = written(two, "other", run_dir="other")
    said = opmix(capsys, "launch", "slurm", life, other, "--nodes", "1", "--dry-run", code=2)
    assert "other stages than" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "3"), "stage pretrain: with 3 node(s) of 1 rank(s): train.global_batch_size 4 must be"),
        (("--nodes", "1", "--stages.last.pool.ranks", "1"), "stage last: pool.ranks 1 leaves no trainer"),
        (("--nodes", "1", "--stages.last.pool.external", "true"), "nothing would start the pool"),
        (
            ("--nodes", "1", "--pool-nodes", "1"),
            "the pool of a lifecycle is the last pool.ranks of its ranks",
        ),
        (("--nodes", "1", "--stages.later.optimizer.lr", "1"), "there is no stage `later`"),
    ],
)
def test_refusals(life: str, capsys, arguments: tuple[str, ...], message: str) -> None:
    assert message in opmix(capsys, "launch", "slurm", life, *arguments, "--dry-run", code=2)


def test_stages_that_have_ended_ask_for_no_ranks_and_keep_their_settings(life: str, capsys) -> None:
    ended(load_lifecycle(life), ["pretrain"])
    several = ("launch", "local", life, "--ranks", "2", "--dry-run")
    ranks = "--stages.pretrain.pool.ranks=2"
    assert "lifecycle" in opmix(capsys, *several, ranks)
    assert "stage midtrain: pool.ranks 2" in opmix(capsys, *several, ranks, "--all.pool.ranks=2", code=2)
    changed = opmix(capsys, *several, "--stages.pretrain.optimizer.lr", "1", code=2)
    assert "stage pretrain has ended with other settings (optimizer.lr)" in changed


def test_a_lifecycle_is_no_run(life: str, capsys) -> None:
    for command in (("train", life), ("plan", life, "--gpu", "h100")):
        assert f"`opmix lifecycle {life} --print-config` prints" in opmix(capsys, *command, code=2)


# --- what is shown ---


def test_status_has_a_line_for_each_stage(life: str, tmp_path: Path, capsys) -> None:
    config = load_lifecycle(life)
    assert "is no run directory" in opmix(capsys, "status", "life", code=2)
    Path("life").mkdir()
    Path("life/lifecycle.yaml").write_text(Path(life).read_text())
    local = LocalProcess(host=os.uname().nodename, pid=os.getpid(), ranks=2, at=now())
    launched = LaunchDir(RunDir("life"))
    launched.write(Launch(cwd=str(tmp_path), local=local))
    launched.config_file.write_text(Path(life).read_text())
    waiting = json.loads(opmix(capsys, "status", "life", "--json", code=1))
    assert waiting["stages"] == {"pretrain": "waiting", "midtrain": "waiting", "last": "waiting"}

    ended(config, ["pretrain"])
    write_record(begun(stages(life)[1]).stopped_file, STOPPED)
    said = opmix(capsys, "status", "life").splitlines()
    for line, words in zip(
        said[2:6], ("pretrain ended: 1 steps", "midtrain step 0/5", "last     waiting", ""), strict=True
    ):
        assert f"stage {words}" in line or (not words and "stopped by SIGUSR1 after step 3" in line)
    told = json.loads(opmix(capsys, "status", "life", "--json"))
    assert told["stages"] == {"pretrain": "ended", "midtrain": "begun", "last": "waiting"}
    assert (told["stage"], told["ended"], told["stopped"]) == ("midtrain", False, True)
    assert not has_ended(Path("life"))

    for command in ("cancel", "resume"):
        hint = opmix(capsys, command, "life/stages/midtrain", code=2)
        assert f"it is a stage, name {tmp_path}/life" in hint
    ended(config, ["midtrain", "last"])
    RunDir("life/stages/midtrain").stopped_file.unlink()
    assert stopped_in(Path("life")) is None
    assert "all stages" in opmix(capsys, "status", "life")
    assert "nothing to resume" in opmix(capsys, "resume", "life", code=2)


def test_top_goes_from_stage_to_stage(life: str, capsys) -> None:
    config = load_lifecycle(life)
    Path("life").mkdir()
    Path("life/lifecycle.yaml").write_text(Path(life).read_text())
    follower = Follower(Path("life"))

    def seen() -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(follower.look())
        return console.file.getvalue()

    assert "none of 3 stages has begun" in seen()
    first, second, _ = stages(life)
    begun(first)
    shown = seen()
    assert "stage 1 of 3, then midtrain, last" in shown
    assert "─ pretrain ─" in shown
    ended(config, ["pretrain"])
    assert "finished" in seen()
    assert not follower.ended, "the next stage will begin"
    begun(second)
    assert "─ midtrain ─" in seen()
    write_record(second.run.stopped_file, STOPPED)
    seen()
    assert follower.ended
    second.run.stopped_file.unlink()
    ended(config, ["midtrain", "last"])
    assert "stage 3 of 3\n" in re.sub(" +", " ", seen()).replace(" \n", "\n")
    assert follower.ended
    assert "stage 3 of 3" in opmix(capsys, "top", "life", "--once")


def test_a_report_is_of_each_stage(life: str, capsys) -> None:
    begun(stages(life)[0])
    Path("life/lifecycle.yaml").write_text(Path(life).read_text())
    assert "name one alone" in opmix(capsys, "report", "life", "life/stages/pretrain", code=2)
    said = opmix(capsys, "report", "life").splitlines()
    assert said[0] == "life/stages/pretrain/report.html"
    assert said[1].endswith("opmix compare life"), "stages that have not begun have none"


# --- what follows an attempt ---


class Attempt:
    """The end of the job script in bash, with a SLURM that says the job runs."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script = script.partition("# --- one world")[0]
        self.folder = folder

    def conclude(self, happens: str) -> str:
        """What the script says at last when ``happens``, of shell, was the attempt, which failed with 3."""
        begins = (
            'touch -d "9 seconds ago" "$RUN/launch/attempt"\n'
            'cd "$RUN/stages" && touch -cd "20 seconds ago" */metrics/*'
        )
        text = f"{self.script}\n{begins}\n{happens}\nconclude 3"
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env={**os.environ, "SLURM_JOB_ID": "17"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.strip().splitlines()[-1]


TRAINS = "mkdir -p {0}/metrics; touch {0}/metrics/train.jsonl"


def test_what_follows_an_attempt(life: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """As for a run, by what all stages have left."""
    script = dry_run(capsys, life, "--nodes", "1", "--retries", "1", "--python", sys.executable)
    commands(tmp_path, monkeypatch, "echo JobState=RUNNING")
    attempt = Attempt(script, tmp_path)
    (tmp_path / "life" / "stages").mkdir(parents=True)

    assert "failed with code 3: not tried again" in attempt.conclude(":"), "nothing was trained"
    both = f"{TRAINS.format('pretrain')}; touch pretrain/summary.json; {TRAINS.format('midtrain')}"
    assert "JobState" in attempt.conclude(both), "requeued: a stage has ended"
    failures = tmp_path / "life" / "launch" / "failures"
    assert failures.read_text() == "0\n"
    assert "JobState" in attempt.conclude(TRAINS.format("midtrain"))
    assert failures.read_text() == "1\n"
    assert "not tried again" in attempt.conclude(TRAINS.format("midtrain")), "twice without a checkpoint"
    saved = f"{TRAINS.format('midtrain')}; mkdir -p midtrain/checkpoints/step_10"
    assert "JobState" in attempt.conclude(saved)
    assert failures.read_text() == "0\n"
    assert "not tried again" in attempt.conclude(":"), "the next stage cannot begin"
    assert "JobState" in attempt.conclude("touch midtrain/stopped.json"), "stopped on request"
    rest = "rm midtrain/stopped.json; mkdir last; touch midtrain/summary.json last/summary.json"
    assert attempt.conclude(rest).endswith("life has ended")
