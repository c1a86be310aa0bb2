"""Whole jobs: the algorithm from end to end, kills and resumes, pools that die. Real ranks over gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import eval_batches
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import SearchStage
from opmix_dist.models.flops import flop_counts
from opmix_dist.models.loss import losses_by_domain, sample_loss_sums
from tests.conftest import DOMAINS
from tests.helpers import ROOT
from tests.train.jobs import BATCH, LENGTH, SEARCH_STEP, STEPS, Job, complete, curve, schedule, tiny_config

pytestmark = pytest.mark.launch


PEAK_TFLOPS = 0.05


def exact_config(data: Path, run: Path) -> dict[str, Any]:
    """Two runs of it must be the same to the last bit."""
    return tiny_config(data, run, deterministic=True, engine={"peak_tflops": PEAK_TFLOPS})


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two trainer ranks and a pool rank, uninterrupted: what other tests compare with."""
    return complete(exact_config(tiny_data, tmp_path_factory.mktemp("finished") / "run"), ranks=3)


def test_every_phase_leaves_what_the_next_needs(finished: RunDir) -> None:
    search = finished.search("0001")
    assert search.status().stage is SearchStage.PROPOSED
    proposal, fit, request = search.proposal(), search.fit(), search.request()
    assert request.components == ["old", *DOMAINS]
    assert np.array(request.composition)[1] == pytest.approx([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    u = np.array([proposal.coefficients[name] for name in request.components])
    assert u @ np.array(request.composition) == pytest.approx(list(proposal.weights.values()), abs=1e-6)
    law = np.exp(fit.parameters["log_c"]) + np.exp(np.array(fit.parameters["t"]) @ u)
    assert law == pytest.approx([proposal.predicted[d] for d in fit.domains], rel=1e-6)
    records = finished.mixtures()
    assert [(r.version, r.step) for r in records] == [(0, 0), (1, SEARCH_STEP)]
    assert records[1].weights == proposal.weights
    assert set(proposal.costs) >= {"probes", "evaluation", "fit"}
    summary = finished.summary()
    assert summary.tokens == STEPS * BATCH * LENGTH == sum(summary.domain_tokens.values())
    assert set(summary.costs) >= {"train", "held-out evaluation", "waiting for the search", "snapshots"}
    assert finished.report_file.stat().st_size > 10_000
    assert finished.complete_checkpoints() == [STEPS - 1, STEPS], "the newest two are kept"


def test_the_log_tells_speed_and_memory(finished: RunDir) -> None:
    lines, summary = finished.train_lines(), finished.summary()
    per_token = flop_counts(AutoModelForCausalLM.from_pretrained(finished.export).config, LENGTH).train()
    for line in lines:
        assert line.seconds > line.data_seconds >= 0
        assert line.tokens_per_second == pytest.approx(BATCH * LENGTH / line.seconds)
        assert line.tokens_per_second_per_device == line.tokens_per_second / 2
        assert line.mfu == pytest.approx(line.tokens_per_second_per_device * per_token / (PEAK_TFLOPS * 1e12))
        assert line.hfu == line.mfu, "nothing is computed again"
    assert [line.step for line in lines if line.memory] == list(range(4, STEPS + 1, 4))
    shard = 4 * summary.parameters / 2  # bytes; the sizes of this model are even
    for memory in (line.memory for line in lines if line.memory):
        assert (memory.parameters, memory.gradients, memory.optimizer) == (shard, shard, 2 * shard)
        assert memory.activations_and_others == memory.peak - 4 * shard
        assert 100 << 20 < memory.peak < 4 << 30, "torch alone takes a few hundred MB"
    trained = summary.costs["train"]
    assert trained.seconds == pytest.approx(sum(line.seconds for line in lines))
    mean = sum(line.mfu * line.seconds for line in lines) / trained.seconds
    assert trained.mfu == pytest.approx(mean)
    assert "its snapshot held training up for" in finished.path.with_suffix(".log").read_text()


def test_what_was_read_follows_the_mixture(finished: RunDir) -> None:
    summary, (first, second) = finished.summary(), finished.mixtures()
    for name in DOMAINS:
        target = SEARCH_STEP * first.weights[name] + (STEPS - SEARCH_STEP) * second.weights[name]
        assert abs(summary.domain_tokens[name] / LENGTH - target * BATCH) <= 1


def test_candidates_are_a_row_each_and_paired(finished: RunDir) -> None:
    table = pq.read_table(finished.search("0001").candidates_file).to_pylist()
    kinds = [row["kind"] for row in table]
    assert (kinds.count("candidate"), kinds.count("snapshot"), kinds.count("proposal")) == (36, 3, 3)
    assert all(
        sum(row[f"x_{d}"] for d in DOMAINS) == pytest.approx(1) for row in table if row["candidate"] >= 0
    )
    proposal = finished.search("0001").proposal()
    by_domain = {row["domain"]: row["loss"] for row in table if row["kind"] == "proposal"}
    assert by_domain == proposal.simulated
    stays = {row["domain"]: row for row in table if row["candidate"] == 0}
    assert all(row["u_old"] == 1 for row in stays.values()), "the current mixture is a candidate"
    alone = np.mean([row["loss"] for row in stays.values()])
    staying = np.mean(list(proposal.simulated_current.values()))
    assert alone - staying == pytest.approx(proposal.gain.averaging), "averaging probes, at the same mixture"


def test_probes_load_with_peft_and_changed_the_model(finished: RunDir, tiny_data: Path) -> None:
    request = finished.search("0001").request()
    heldout = eval_batches(Catalogue.open(tiny_data, DOMAINS), samples_per_domain=4, seed=0)
    snapshot = finished.path / request.snapshot
    base = sample_loss_sums(AutoModelForCausalLM.from_pretrained(snapshot).eval(), heldout.batch, 4)
    for name in request.components:
        probe = finished.search("0001").probe(name)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(snapshot), str(probe)).eval()
        adapted = sample_loss_sums(model, heldout.batch, 4)
        moved = ((adapted - base) / heldout.batch.targets).abs().max()
        assert 1e-3 < moved < 1.0
        assert len(files.read_jsonl(finished.search("0001").curve(name))) == 24


def test_export_loads_with_transformers_and_scores_the_reported_loss(
    finished: RunDir, tiny_data: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.export).eval()
    catalogue = Catalogue.open(tiny_data, DOMAINS)
    heldout = eval_batches(catalogue, samples_per_domain=4, seed=0, skip=4)
    sums = sample_loss_sums(model, heldout.batch, 4)
    found = losses_by_domain(sums.numpy(), heldout.batch.targets.numpy(), heldout.domain_ids.numpy(), 3)
    summary = finished.summary()
    assert found.loss.tolist() == pytest.approx([summary.final_loss[name] for name in DOMAINS], rel=1e-5)
    assert found.stderr.tolist() == pytest.approx([summary.final_stderr[name] for name in DOMAINS], rel=1e-3)
    text = "import os\n"
    tokenizer = AutoTokenizer.from_pretrained(finished.export)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def in_search(job: Job) -> bool:
    return job.run.search("0001").status_file.exists()


@pytest.mark.parametrize(
    ("moment", "reached"),
    [
        ("before the first checkpoint", lambda job: job.steps_done() >= 1),
        ("during the search", in_search),
        ("after the switch", lambda job: job.steps_done() >= STEPS - 5),
    ],
)
def test_kill_9_and_resume_equal_an_uninterrupted_run(
    finished: RunDir, tiny_data: Path, tmp_path: Path, moment: str, reached
) -> None:
    """With a reader process, which outlives a killed trainer for a while."""
    config = exact_config(tiny_data, tmp_path / "run")
    config["data"]["num_workers"] = 1
    job = Job(config, ranks=3)
    job.wait_until(lambda: reached(job), moment)
    job.kill()
    assert not job.run.summary_file.exists(), "the kill came too late"
    run = complete(config, ranks=3)
    assert curve(run) == curve(finished)
    assert schedule(run) == schedule(finished)
    assert run.eval_lines() == finished.eval_lines()
    assert run.summary().domain_tokens == finished.summary().domain_tokens


def test_a_killed_pool_worker_is_started_again_and_the_search_succeeds(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    job = Job(tiny_config(tiny_data, tmp_path / "run"), ranks=3)
    job.wait_until(lambda: in_search(job) and bool(job.pool_workers()), "a worker that searches")
    (first,) = job.pool_workers()
    os.kill(first, signal.SIGKILL)
    assert job.finish() == 0, job.log()
    assert "ended with code -9" in job.log_file.read_text()
    assert schedule(job.run) == schedule(finished)


def test_a_pool_that_keeps_dying_leaves_training_on_the_old_mixture(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", pool={"max_restarts": 0})
    config["search"]["probes"]["steps"] = 100_000  # so that the kill comes in the middle
    job = Job(config, ranks=3)
    job.wait_until(lambda: in_search(job) and bool(job.pool_workers()), "a worker that searches")
    os.kill(job.pool_workers()[0], signal.SIGKILL)
    assert job.finish() == 0, job.log()
    first, second = job.run.mixtures()
    assert (second.changed, second.version, second.weights) == (False, 0, first.weights)
    assert "died 1 time(s), last with exit code -9" in second.why
    assert job.steps_done() == STEPS
    assert job.run.search("0001").status().stage is SearchStage.FAILED


def test_a_nan_probe_fails_the_search_by_name_and_training_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    config["search"]["probes"]["lr_multiplier"] = 1e30
    run = complete(config, ranks=3)
    _, second = run.mixtures()
    assert not second.changed
    assert "probe `" in second.why
    assert "loss nan" in second.why
    assert run.summary().steps == STEPS
    assert run.report_file.exists()


def test_an_external_pool_that_goes_silent_is_given_up(tiny_data: Path, tmp_path: Path) -> None:
    """No pool is ever started: the heartbeat alone must notice."""
    config = tiny_config(
        tiny_data, tmp_path / "run", pool={"ranks": 0, "external": True, "heartbeat_timeout_s": 3.0}
    )
    run = complete(config, ranks=2)
    assert "no sign of life for 3 s" in run.mixtures()[1].why
    assert run.summary().steps == STEPS


def test_an_external_pool_answers_and_ends_with_the_run(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    job = Job(tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0, "external": True}), ranks=2)
    command = [sys.executable, "-m", "opmix_dist.cli", "pool", "--run", str(job.run.path)]
    pool = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert job.finish() == 0, job.log()
        assert pool.wait(30) == 0
    finally:
        pool.kill()
    assert schedule(job.run) == schedule(finished)


def test_training_starts_from_a_checkpoint_of_another_run(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    """On fixed weights, without a search."""
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0}, model={"config": None})
    config["model"]["checkpoint"] = str(finished.export)
    config["mixture"] = {"policy": "static", "initial": {"prose": 0.75, "python": 0.25}}
    config["train"]["steps"] = 2
    config["data"]["num_workers"] = 1
    run = complete(config, ranks=1)
    assert run.train_lines()[0].loss < finished.train_lines()[0].loss - 0.3
    assert run.summary().domain_tokens == {"json": 0, "prose": 12 * LENGTH, "python": 4 * LENGTH}
    assert run.search_dirs() == []


def test_inline_search_on_one_process_agrees_with_the_pool(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    run = complete(tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0}), ranks=1)
    ours, theirs = run.search("0001").proposal(), finished.search("0001").proposal()
    for name in DOMAINS:
        assert ours.weights[name] == pytest.approx(theirs.weights[name], abs=0.01)
        assert ours.simulated[name] == pytest.approx(theirs.simulated[name], rel=1e-3)


def test_a_gain_within_its_uncertainty_keeps_the_mixture(tiny_data: Path, tmp_path: Path) -> None:
    """No gain of so short a search is certain to one in a million."""
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0})
    config["search"]["proposal"] = {"no_move": True, "confidence": 0.999999}
    run = complete(config, ranks=1)
    first, second = run.mixtures()
    assert (second.changed, second.version, second.weights) == (False, 0, first.weights)
    assert "search 0001 keeps the mixture: gain" in second.why
    assert second.requested_step == SEARCH_STEP
    proposal = run.search("0001").proposal()
    assert proposal.chosen == first.weights != proposal.weights
    assert run.summary().mixture == first.weights
    assert "Keep the mixture." in run.report_file.read_text()


def test_two_pool_ranks_share_the_work_and_survive_the_death_of_one(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    job = Job(tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 2}), ranks=4)
    job.wait_until(lambda: in_search(job) and len(job.pool_workers()) == 2, "two workers that search")
    before = set(job.pool_workers())
    os.kill(max(before), signal.SIGKILL)
    job.wait_until(lambda: not before & set(job.pool_workers()), "both workers started again")
    assert job.finish() == 0, job.log()
    ours, theirs = job.run.search("0001").proposal(), finished.search("0001").proposal()
    assert ours.weights == theirs.weights
    assert ours.simulated == theirs.simulated


def test_a_run_continues_on_another_number_of_trainers(
    finished: RunDir, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    job = Job(config, ranks=3)
    job.wait_until(lambda: bool(job.run.complete_checkpoints()), "a checkpoint")
    job.kill()
    config["pool"]["ranks"] = 0
    run = complete(config, ranks=1)
    assert run.summary().world_size == 1
    assert run.summary().domain_tokens == finished.summary().domain_tokens
    for found, expected in zip(run.train_lines(), finished.train_lines(), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        assert found.domain_loss.keys() == expected.domain_loss.keys()


def test_a_snapshot_that_cannot_be_written_fails_the_search_only(tiny_data: Path, tmp_path: Path) -> None:
    """And the cosine schedule, TensorBoard's events and metrics for Prometheus, which need a run anyway."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        pool={"ranks": 0},
        schedule={"name": "cosine", "warmup_steps": 2},
        logging={"tensorboard": True, "prometheus_port": port},
    )

    def metrics() -> str:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
        ):
            return answer.read().decode()
        return ""

    job = Job(config, ranks=1)
    job.wait_until(job.run.config_file.exists, "the run directory")
    job.run.snapshots.write_text("a file where a folder should be")
    job.wait_until(lambda: "\nopmix_train_loss " in metrics(), "the first step's metrics")
    assert job.finish() == 0, job.log()
    assert metrics() == ""
    assert "the snapshot could not be written" in job.run.mixtures()[1].why
    assert job.steps_done() == STEPS
    assert list((job.run.path / "metrics" / "tensorboard").glob("events.out.tfevents.*"))


def test_training_goes_on_during_an_asynchronous_search(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    config["search"]["mode"] = "async"
    config["train"]["steps"] = 200
    config["search"]["start_fraction"] = SEARCH_STEP / 200
    config["checkpoint"]["interval_steps"] = 0
    job = Job(config, ranks=3)
    run, search = job.run, job.run.search("0001")
    job.wait_until(search.request_file.exists, "a request")
    seen = job.steps_done()
    job.wait_until(lambda: job.steps_done() > seen, "a step after the request")
    with job.trainers_held(2):
        before = job.steps_done()
        assert run.mixtures()[1:] == []
        job.wait_until(lambda: in_search(job) and search.status().stage.final, "the end of the search")
    assert job.finish() == 0, job.log()
    _, second = run.mixtures()
    assert second.changed
    assert (second.requested_step, search.request().step) == (SEARCH_STEP, SEARCH_STEP)
    assert SEARCH_STEP <= seen < before <= second.step < 200
    switched = {line.mixture_version for line in run.train_lines() if line.step > second.step}
    assert switched == {1}


def test_the_launch_ends_with_the_training_though_a_search_is_under_way(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    config["search"]["mode"] = "async"
    config["search"]["probes"]["steps"] = 100_000
    config["train"]["steps"] = 200
    config["checkpoint"]["interval_steps"] = 0
    job = Job(config, ranks=3)
    job.wait_until(job.run.search("0001").request_file.exists, "a request")
    with job.trainers_held(2):
        job.wait_until(lambda: in_search(job), "a worker that searches")
    assert job.finish() == 0, job.log()
    assert [record.step for record in job.run.mixtures()] == [0]
    assert job.run.search("0001").status().stage is SearchStage.PROBING


def test_a_job_outlives_the_shell_that_started_it(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", pool={"ranks": 0}, mixture={"policy": "static"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = f"{sys.executable} -m opmix_dist.cli train {tmp_path}/config.yaml > {tmp_path}/log 2>&1 &"
    subprocess.run(["sh", "-c", command], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary, end = tmp_path / "run" / "summary.json", time.monotonic() + 120
    while not summary.exists():
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.2)


def test_resuming_a_finished_run_does_nothing_and_other_settings_are_refused(
    finished: RunDir, tiny_data: Path
) -> None:
    before = finished.train_file.read_bytes()
    config = exact_config(tiny_data, finished.path)
    assert complete(config, ranks=3).train_file.read_bytes() == before
    job = Job(config, ranks=3, overrides=("--optimizer.lr=1", "--seed=5"))
    assert job.finish() != 0
    assert "started with other settings (seed, optimizer.lr)" in job.log()
    assert finished.train_file.read_bytes() == before
    assert files.is_complete(finished.export)
