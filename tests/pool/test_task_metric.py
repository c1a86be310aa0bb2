"""Searches on error rates: what is measured of candidates, and a whole search of one."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from opmix_dist.config import check_config
from opmix_dist.data.build import held_out_samples, open_data
from opmix_dist.data.catalogue import TASKS_FILE
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.models.loss import sample_loss_sums
from opmix_dist.pool.task_metric import TaskMetric, search_tasks
from opmix_dist.report.html import write_report
from opmix_dist.search_config import TaskMetricConfig
from opmix_dist.tasks.error_rates import ErrorRate
from opmix_dist.tasks.scoring import ScoringOptions, score
from opmix_dist.tasks.unseen import searched_digests
from opmix_dist.train.roles import run_job
from tests.methods.on_policy_jobs import job_config, make_data
from tests.models import tiny

SETTINGS = TaskMetricConfig(per_domain=5, max_new_tokens=4, batch_size=3)


@pytest.fixture(scope="module")
def data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats with tasks, some of which an untrained model does well by chance; and notes without."""
    found = make_data(tmp_path_factory.mktemp("task_metric"))
    words = ["apple", "blue", "cloud", "door"]
    tasks = [
        {"kind": "multiple_choice", "messages": [{"role": "user", "content": f"Say {i} {word}"}],
         "choices": words, "answer": word, "group": word}
        for i in range(3) for word in words
    ]  # fmt: skip
    (found / "chats" / TASKS_FILE).write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return found


@pytest.mark.parametrize("mask", [False, True])
def test_errors_are_those_of_merged_models(data: Path, mask: bool) -> None:
    config = check_config(job_config(data, Path("unused"), {"name": "plain"}))
    config = config.model_copy(update={"data": config.data.model_copy(update={"mask_documents": mask})})
    catalogue = open_data(config.data)
    samples = held_out_samples(config.data, catalogue, samples_per_domain=4, seed=0)
    heldout, metric = TaskMetric.instead(samples, catalogue, SETTINGS, mask=mask, seed=0)
    assert heldout.domain_ids.tolist() == [0] * 5 + [1] * 4
    assert heldout.batch.targets[:5].tolist() == [1] * 5
    model = tiny.build("llama", vocab_size=catalogue.vocab_size, spread=0.6)
    plain = tiny.build("llama", vocab_size=catalogue.vocab_size, spread=0.6)
    adapters = tiny.adapt(model, size=0.5)
    found = metric.sums(adapters, tiny.U, heldout.batch, batch_size=2, on_progress=lambda samples: None)
    tasks = search_tasks(catalogue, "chats", 5, seed=0)
    rates = set()
    for u, sums in zip(tiny.U, found, strict=True):
        merged = tiny.written(plain, adapters, u, torch.float32)
        errors = score(merged, metric.tokenizer, tasks, ScoringOptions(max_new_tokens=4)).errors
        assert sums[:5].mean() == pytest.approx((errors.sum() + 0.5) / 6)
        assert sums[5:] == pytest.approx(sample_loss_sums(merged, heldout.batch[slice(5, 9)], 4), rel=1e-4)
        rates.add(errors.mean())
    assert len(rates) > 1, "all candidates err alike"
    assert metric.take_tokens() > metric.take_tokens() == 0
    of_tasks = [[one.group for one in tasks].index(task.group) for task in tasks]
    found_clusters = metric.clusters.tolist()
    assert [found_clusters.index(one) for one in found_clusters] == [*of_tasks, 5, 6, 7, 8]
    assert len({*of_tasks}) < 5, "two tasks of one group"


def test_the_choice_of_tasks_is_seeded(data: Path) -> None:
    catalogue = open_data(check_config(job_config(data, Path("unused"), {"name": "plain"})).data)
    first, again, other = (search_tasks(catalogue, "chats", 6, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert search_tasks(catalogue, "chats", 4, 0) == first[:4]


def test_a_search_on_error_rates(data: Path, tmp_path: Path) -> None:
    config = job_config(data, tmp_path / "run", {"name": "plain"})
    config["mixture"] = {"policy": "opmix"}
    config["search"] = {
        "metric": "tasks", "tasks": SETTINGS.model_dump(), "start_fraction": 0.5,
        "probes": {"steps": 3, "batch_size": 2, "rank": 2},
        "candidates": {"count": 5, "samples_per_domain": 4}, "refinement": {"rounds": 0},
        "proposal": {"bootstrap": 5},
    }  # fmt: skip
    run_job(check_config(config))
    (search,) = RunDir(tmp_path / "run").search_dirs()
    proposal = search.proposal()
    for losses in (proposal.simulated, proposal.snapshot, proposal.simulated_current):
        k = losses["chats"] * 6 - 0.5
        assert k == pytest.approx(round(k), abs=1e-9)
        assert 0 <= round(k) <= 5
        assert losses["notes"] > 2, "nats per token"
    rows = pq.read_table(search.candidates_file).to_pylist()
    errors = np.array([row["loss"] for row in rows if row["domain"] == "chats"])
    assert ((errors > 0) & (errors < 1)).all()
    assert proposal.costs["evaluation"].tokens > 0
    assert proposal.error_rates == ["chats"]
    tasks = search_tasks(open_data(check_config(config).data), "chats", 5, 0)
    assert searched_digests([tmp_path / "run"]) == {task.digest for task in tasks}

    # errors are between groups: as if any `wrong` of the five tasks had been, it matters which of a group
    (alone,) = [row for row in rows if (row["kind"], row["domain"]) == ("snapshot", "chats")]
    wrong = round(alone["loss"] * 6 - 0.5)
    each = [np.isin(np.arange(5), some).astype(float) for some in combinations(range(5), wrong)]
    rates = [ErrorRate.of(errors, [task.group for task in tasks]).stderr * 5 / 6 for errors in each]
    assert alone["stderr"] == pytest.approx(min(rates, key=lambda rate: abs(rate - alone["stderr"])))
    assert not np.isclose(alone["stderr"], ErrorRate.of(each[0], [""] * 5).stderr * 5 / 6)
    assert "chats (error rate)" in write_report(RunDir(tmp_path / "run")).read_text()


def test_what_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    config = job_config(data, tmp_path / "run", {"name": "plain"})
    config["search"] |= {"metric": "tasks", "gradients": True}
    with pytest.raises(UserError, match="search.metric tasks takes candidates in full and without gradients"):
        check_config(config)
    settings = check_config(job_config(data, tmp_path, {"name": "plain"})).data
    catalogue = open_data(settings)
    notes = type(catalogue)(catalogue.root, ("notes",), {"notes": catalogue.domains["notes"]})
    samples = held_out_samples(
        check_config(job_config(data, tmp_path, {"name": "plain"})).data,
        catalogue,
        samples_per_domain=2,
        seed=0,
    )
    with pytest.raises(UserError, match="no domain of .* has a tasks.jsonl"):
        TaskMetric.instead(samples, notes, SETTINGS, mask=False, seed=0)
    name, file = "chats", catalogue.root / "chats" / TASKS_FILE
    lines = file.read_text().splitlines(keepends=True)
    copy = tmp_path / "copy"
    shutil.copytree(catalogue.root, copy)
    (copy / name / TASKS_FILE).write_text("".join(line for line in lines if '"group": "door"' in line))
    copied = type(catalogue)(copy, catalogue.names, catalogue.domains)
    with pytest.raises(UserError, match=r"3 task\(s\) of .*chats/tasks.jsonl .* are of one group"):
        TaskMetric.instead(samples, copied, SETTINGS, mask=False, seed=0)
