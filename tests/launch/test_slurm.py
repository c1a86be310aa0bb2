"""The job scripts on a real SLURM: two worlds, preemption, a node that dies, cancelled and resumed jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opmix_dist.cli import main
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.launch.records import LaunchDir
from opmix_dist.launch.slurm import job_state
from tests.helpers import ROOT
from tests.launch.cluster import Cluster, install, missing
from tests.train.jobs import SEARCH_STEP, curve, tiny_config

pytestmark = pytest.mark.launch

STEPS = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three virtual nodes; `opmix` in this process finds them."""
    if missing():
        install()
    if missing():
        pytest.skip(f"no SLURM here, and it could not be installed: {', '.join(missing())} missing")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.environment, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class Watched:
    """A run, and what `opmix` says of it."""

    def __init__(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.capsys = RunDir(run), capsys

    def opmix(self, *arguments: str, code: int = 0) -> str:
        found = main(list(arguments))
        said = self.capsys.readouterr()
        assert found == code, said.out + said.err
        return said.out + said.err

    def status(self, code: int = 0) -> dict[str, Any]:
        return json.loads(self.opmix("status", str(self.run.path), "--json", code=code))

    def steps(self) -> int:
        return max((line.step for line in self.run.train_lines()), default=0)

    def wait_for(self, condition: Callable[[], object], what: str, timeout_s: float = 180.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}\n{self.log()}"
            assert "not tried again" not in self.log(), f"ended before: {what}\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return "\n".join(path.read_text()[-6000:] for path in self.run.launch.glob("slurm-*.out"))


def written(config: dict[str, Any]) -> str:
    file = Path(config["run_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return str(file)


def static(data: Path, run: Path) -> dict[str, Any]:
    """Two ranks, no search, steps of some 50 ms, checkpoints far apart."""
    return tiny_config(
        data,
        run,
        mixture={"policy": "static"},
        pool={"ranks": 0},
        train={"steps": STEPS, "global_batch_size": 32, "eval_interval_steps": 0},
        checkpoint={"interval_steps": 25},
    )


def undisturbed(config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The same on two ranks of this machine, in the background."""
    command = [sys.executable, "-m", "opmix_dist.cli", "launch", "local", written(config), "--ranks", "2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def attempts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An array whose ranks are played, each task a story of attempts. It runs beside the other tests."""
    stories = {
        "0": ["fail"] * 4,
        "1": ["save and fail", "save and fail", "fail", "end"],
        "2": ["fail early"] * 2,
        "3": ["wait"] * 6,
        "4": ["save and fail"] * 6,
    }
    folder = tmp_path_factory.mktemp("array") / "runs"
    for seed, story in stories.items():
        (folder / f"seed_{seed}" / "launch").mkdir(parents=True)
        (folder / f"seed_{seed}" / "launch" / "play").write_text("\n".join(story) + "\n")
    config = written(tiny_config(folder, folder, pool={"ranks": 0}))
    options = ["--nodes", "1", "--time", "5", "--retries", "2", "--max-requeues", "3"]
    options += ["--vary", f"seed={','.join(stories)}", "--python", str(Path(__file__).parent / "stand_in.py")]
    assert main(["launch", "slurm", config, *options]) == 0
    return folder


def test_preempted_and_bereft_of_a_node_it_ends_as_if_nothing_had_happened(
    cluster: Cluster, attempts: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the end of an allocation the ranks save where they are; a node's death costs the steps since the
    last checkpoint; either way the job is requeued and goes on, on whatever nodes are there."""
    job = Watched(tmp_path / "run", capsys)
    said = job.opmix(
        "launch", "slurm", written(static(tiny_data, tmp_path / "run")), "--nodes", "2", "--time", "5"
    )
    assert said.startswith("job ")
    job.wait_for(lambda: job.steps() >= 3, "training on two nodes")
    assert "runs for" in job.opmix("resume", str(job.run.path), code=2), "one job for one run"

    name = job.status()["job"]["job"]
    for _ in range(2):  # as SLURM does before the end of an allocation
        cluster.run("scancel", "--batch", "--signal=USR1", name)
    job.wait_for(job.run.stopped, "a stop on request")
    stopped = job.run.stopped()
    assert stopped.signal == "SIGUSR1"
    assert stopped.step == stopped.checkpoint < STEPS
    assert stopped.step % 25, "not where a checkpoint was due"

    job.wait_for(lambda: job.steps() > stopped.step + 3, "the requeued job goes on")
    cluster.kill_node(cluster.nodes[1])
    whole = undisturbed(static(tiny_data, tmp_path / "whole"))  # there is time until SLURM notices
    before = job.steps()
    assert before < STEPS, "killed too late"
    # SLURM takes the node for down, and requeues the job; here the node comes back after that
    cluster.wait_until(lambda: cluster.state_of(cluster.nodes[1]).startswith("down"), "a node down", 60)
    cluster.start_node(cluster.nodes[1])
    job.wait_for(job.run.summary_file.exists, "the end")
    cluster.wait_until(lambda: not job.status()["active"], "the job's end", 30)
    assert job.status()["job"]["state"] == "COMPLETED"
    assert job.status()["job"]["restarts"] == 2
    assert whole.wait(120) == 0
    assert curve(job.run) == curve(RunDir(tmp_path / "whole"))


def test_a_pool_in_a_component_of_its_own_and_a_run_that_is_cancelled_and_resumed_on_more_nodes(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cancelled while the trainers wait for the pool's answer; the probes that are finished stay."""
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0})
    run = Watched(tmp_path / "run", capsys)
    run.opmix("launch", "slurm", written(config), "--nodes", "1", "--pool-nodes", "1", "--time", "5")
    run.wait_for(lambda: run.run.search("0001").status_file.exists(), "the pool's first sign")
    assert run.status()["step"] == SEARCH_STEP, "trainers wait"
    run.opmix("cancel", str(run.run.path))
    cluster.wait_until(lambda: not run.status()["active"], "the job's end", 60)
    status = run.status()
    assert (status["job"]["state"], status["stopped"], status["checkpoint"]) == (
        "CANCELLED",
        True,
        SEARCH_STEP,
    )
    assert "resume" in run.opmix("status", str(run.run.path))

    run.opmix("resume", str(run.run.path), "--nodes", "2")
    run.wait_for(run.run.summary_file.exists, "the end")
    assert run.run.summary().world_size == 2
    assert [record.search for record in run.run.mixtures()] == [None, "0001"]
    assert run.run.mixtures()[1].changed
    cluster.wait_until(lambda: not run.status()["active"], "the job's end", 30)
    assert run.status()["job"]["state"] == "COMPLETED", "the pool's step ends with the trainers'"
    assert "nothing to resume" in run.opmix("resume", str(run.run.path), code=2)


def test_what_follows_an_attempt(
    attempts: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failures are tried again as long as there is progress, mistakes and cancelled jobs are not."""
    home = Watched(attempts, capsys)
    job = LaunchDir(home.run).read().submissions[0].job
    task = Watched(attempts / "seed_3", capsys)
    task.wait_for((task.run.launch / "attempts").exists, "its ranks")
    # the death of a node in another test may have requeued it
    waited = len((task.run.launch / "attempts").read_text().splitlines())
    cluster.run("scancel", f"{job}_3")  # not by `opmix cancel`: its ranks save, and it is over all the same
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}"), "all tasks", 60)

    def told(seed: int) -> tuple[int, str, str]:
        run = attempts / f"seed_{seed}"
        last = (attempts / "launch" / f"slurm-{job}_{seed}.out").read_text().strip().splitlines()[-1]
        state = job_state(f"{job}_{seed}").state
        return len((run / "launch" / "attempts").read_text().splitlines()), state, last

    count, state, last = told(0)
    assert (count, state) == (3, "FAILED"), "twice more"
    assert last.endswith("failed with code 3: not tried again")
    assert told(1)[:2] == (4, "COMPLETED"), "a new checkpoint each time, and then an end"
    assert told(2)[:2] == (1, "FAILED"), "what never came to train is a mistake"
    assert told(3)[:2] == (waited, "CANCELLED")
    assert (attempts / "seed_3" / "stopped.json").exists()
    count, state, last = told(4)
    assert (count, state) == (4, "FAILED")
    assert "requeued 3 times already: given up" in last
