"""What needs no SLURM: scripts and commands that would run, refusals, and SLURMs that give no answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch import records, slurm
from opmix_dist.launch.records import Launch, LaunchDir, SlurmOptions, Submission
from opmix_dist.launch.slurm import JobPhase, NoAnswerError, parse_job
from opmix_dist.launch.work import load_work
from tests.helpers import ROOT
from tests.train.jobs import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A global batch of 8 and a micro-batch of 2: 1, 2 or 4 trainer ranks."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "data", tmp_path / "run", pool={"ranks": 0})))
    return str(file)


def opmix(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    found = main(list(arguments))
    said = capsys.readouterr()
    assert found == code, said.out + said.err
    return said.out + said.err


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The script, after bash has parsed it."""
    script = opmix(capsys, "launch", "slurm", *arguments, "--dry-run")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)


def test_a_script_is_filled_and_nothing_is_written(config: str, tmp_path: Path, capsys) -> None:
    options = (
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--time",
        "1:00:00",
        "--cpus-per-task",
        "8",
        "--grace-s",
        "90",
    )
    more = ("--sbatch=--comment=two words", "--setup", "module load cuda", "--srun=--container-image=a b")
    script = dry_run(capsys, config, *options, *more)
    assert directives(script) == [
        "--job-name=run",
        f"--chdir={os.getcwd()}",
        f"--output={tmp_path}/run/launch/slurm-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@90",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=1:00:00",
        "--comment=two words",
    ]
    assert "\nmodule load cuda\n" in script
    assert "\nRANKS_PER_NODE=2\n" in script
    assert "\nSRUN_OPTIONS=(--cpus-per-task=8 '--container-image=a b')\n" in script
    assert f"sbatch --parsable {tmp_path}/run/launch/job.sh" in script
    assert not (tmp_path / "run").exists()


def test_a_pool_of_its_own_is_a_second_component(config: str, capsys) -> None:
    pool = ("--pool-nodes", "1", "--pool-partition", "small")
    script = dry_run(capsys, config, "--nodes", "2", "--gpus-per-node", "2", "--partition", "big", *pool)
    first, _, second = script.partition("#SBATCH hetjob")
    assert "--partition=big" in first
    assert directives(second) == [
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--partition=small",
    ]


def test_sizes_and_seeds_are_an_array(config: str, tmp_path: Path, capsys) -> None:
    large = tmp_path / "large.yaml"
    large.write_text(Path(config).read_text().replace(f"{tmp_path}/run", f"{tmp_path}/large"))
    script = dry_run(capsys, config, str(large), "--vary", "seed=0,7", "--nodes", "1", "--array-limit", "2")
    assert "--array=0-3%2" in directives(script)
    runs = re.search(r"^RUNS=\((.*?)^\)", script, flags=re.MULTILINE | re.DOTALL)[1].split()
    assert runs == [f"{tmp_path}/{size}/seed_{seed}" for size in ("run", "large") for seed in (0, 7)]
    same = ("launch", "slurm", config, config, "--nodes", "1", "--dry-run")
    assert "two runs would share" in opmix(capsys, *same, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "3"), "with 3 node(s) of 1 rank(s): train.global_batch_size 8 must be a multiple"),
        (("--nodes", "1-4"), "with 3 node(s)"),
        (("--nodes", "1", "--pool.ranks", "1"), "pool.ranks 1 leaves no trainer"),
        (("--nodes", "1", "--pool.external", "true"), "--pool-nodes"),
        (("--nodes", "many"), "--nodes many"),
        (("--nodes", "1", "--grace-s", "1"), "--grace-s 1"),
        (("--nodes", "1", "--partition", "a\n#SBATCH --wrap"), "must be one line"),
        (("--nodes", "1", "--train.step", "3"), "`train.steps`"),
        (("--nodes", "1", "--vary", "seed"), "dotted.key=value"),
    ],
)
def test_refusals(config: str, capsys, arguments: tuple[str, ...], message: str) -> None:
    assert message in opmix(capsys, "launch", "slurm", config, *arguments, "--dry-run", code=2)


def test_torchrun_commands(config: str, tmp_path: Path, capsys) -> None:
    local = opmix(capsys, "launch", "local", config, "--ranks", "4", "--dry-run")
    assert "--standalone --nproc-per-node=4 --signals-to-handle=SIGQUIT" in local
    assert local.rstrip().endswith(f"train {tmp_path}/run/launch/config.yaml")
    several = ("--nodes", "2", "--node-rank", "1", "--ranks-per-node", "2", "--head", "10.0.0.1", "--dry-run")
    said = opmix(capsys, "launch", "torchrun", config, *several)
    assert "--nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500" in said


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.stem)
def test_shipped_scripts_print_what_they_would_run(script: Path, tmp_path: Path) -> None:
    (tmp_path / "opmix").write_text(f'#!/bin/sh\nexec {sys.executable} -m opmix_dist.cli "$@"\n')
    (tmp_path / "opmix").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    place = {"NODES": "2", "NODE": "0", "HEAD": "10.0.0.1"}
    done = subprocess.run(
        [script, "configs/demo.yaml", "--dry-run", "--train.global_batch_size", "256", "--pool.ranks", "0"],
        cwd=ROOT,
        env={**os.environ, **place, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run" in done.stdout


# --- a run directory that was launched, and SLURMs that do and do not answer ---


@pytest.fixture
def launched(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    options = SlurmOptions(nodes="1", ranks_per_node=1, python=sys.executable)
    submission = Submission(job="17", at=records.now(), nodes="1")
    LaunchDir(run).write(Launch(cwd=str(tmp_path), options=options, submissions=[submission]))
    config = tiny_config(tmp_path / "data", tmp_path / "run", pool={"ranks": 0})
    LaunchDir(run).config_file.write_text(yaml.safe_dump(config))
    return run


def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A PATH whose SLURM commands all are ``script``, which sees their name and arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "sbatch", "scancel", "squeue"):
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 1.0)


DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (DOWN, "Unable to contact"),
        ("exec sleep 20", "no answer in 1 s"),
        ("exit 0", "says nothing"),
        ("exit 1", "exit code 1"),
        ('echo "a SLURM of tomorrow says so" >&2; exit 1', "of tomorrow"),
        (None, "there is no"),
    ],
    ids=["controller down", "hangs", "silent", "fails silently", "unknown words", "not installed"],
)
def test_no_answer_is_neither_failed_nor_ended(
    launched: RunDir, tmp_path: Path, monkeypatch, capsys, script: str | None, why: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        commands(tmp_path, monkeypatch, script)
    before = LaunchDir(launched).read()
    for command in ("status", "cancel", "resume"):
        said = opmix(capsys, command, str(launched.path), code=69)
        assert "could not ask SLURM" in said
        assert why in said
    told = json.loads(opmix(capsys, "status", str(launched.path), "--json", code=69))
    assert told["active"] is None
    assert LaunchDir(launched).read() == before
    assert not LaunchDir(launched).cancelled_file.exists()


def test_a_refused_job_is_told_in_slurms_words_and_not_recorded(
    launched: RunDir, tmp_path: Path, monkeypatch, capsys
) -> None:
    refusal = (
        'case $0 in *scontrol) echo "JobId=17 JobState=FAILED Reason=NonZeroExitCode NodeList=n1";;'
        ' *) echo "sbatch: error: invalid partition specified: x" >&2; exit 1;; esac'
    )
    commands(tmp_path, monkeypatch, refusal)
    assert "invalid partition specified: x" in opmix(capsys, "resume", str(launched.path), code=2)
    assert len(LaunchDir(launched).read().submissions) == 1
    assert "17 FAILED on n1 (NonZeroExitCode)" in opmix(capsys, "status", str(launched.path), code=1)


def test_a_job_that_slurm_has_forgotten_is_an_answer(
    launched: RunDir, tmp_path: Path, monkeypatch, capsys
) -> None:
    unknown = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
    forgotten = f"case $0 in *sbatch) echo 18;; *) {unknown};; esac"
    commands(tmp_path, monkeypatch, forgotten)
    assert "knows no such job" in opmix(capsys, "status", str(launched.path), code=1)
    assert "job 18" in opmix(capsys, "resume", str(launched.path), "--nodes", "2")
    assert [(s.job, s.nodes) for s in LaunchDir(launched).read().submissions] == [("17", "1"), ("18", "2")]
    assert "--nodes=2" in directives(LaunchDir(launched).script.read_text())


def test_nobody_elses_launch_is_run_again(launched: RunDir, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert "belongs to another user" in opmix(capsys, "resume", str(launched.path), code=2)


@pytest.mark.parametrize("job", ["17; rm -rf /", "--all", "", "0", "17_"])
def test_job_ids_are_checked_before_they_reach_a_command(launched: RunDir, capsys, job: str) -> None:
    file = LaunchDir(launched).file
    file.write_text(file.read_text().replace('"17"', json.dumps(job)))
    for command in ("status", "cancel", "resume"):
        assert "launch.json is not a valid Launch" in opmix(capsys, command, str(launched.path), code=2)


@pytest.mark.parametrize(
    ("state", "phase"),
    [("PENDING", "waiting"), ("REQUEUED", "waiting"), ("COMPLETING", "running"), ("NODE_FAIL", "ended")],
)
def test_states(state: str, phase: str) -> None:
    found = parse_job("5", f"JobId=5 JobState={state} Reason=None Restarts=3 NodeList=(null) BatchHost=a")
    assert (found.phase, found.nodes, found.restarts) == (JobPhase(phase), "", 3)


def test_a_job_without_a_state_is_no_answer() -> None:
    with pytest.raises(NoAnswerError):
        parse_job("5", "JobId=5")


def test_status_of_something_else(tmp_path: Path, capsys) -> None:
    assert "is no run directory" in opmix(capsys, "status", str(tmp_path), code=2)


def test_ranks_that_a_configuration_cannot_use_are_refused_before_they_are_there(config: str) -> None:
    wide = load_work(Path(config), ["--engine.name", "fsdp", "--engine.fsdp.tensor_parallel", "2"])
    wide.check_allocation(range(1, 3), 2)
    with pytest.raises(UserError, match="divides the model over 2 ranks"):
        wide.check_allocation(range(1, 2), 3)
