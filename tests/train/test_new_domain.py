"""A folder of data that gains a domain while a run that takes all of it is down."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.jobs import Job, complete, tiny_config


@pytest.mark.launch
def test_a_run_that_takes_all_domains_survives_a_new_one(tiny_data: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint: the mixture that it replays does not name the domain. As nothing of
    it was trained on, the search, which may not leave its prior's domains, keeps it at 0."""
    data = tmp_path / "data"
    for name in ("tokenizer", "json", "prose"):
        shutil.copytree(tiny_data / name, data / name)
    config = tiny_config(data, tmp_path / "run", pool={"ranks": 0})
    config["data"]["domains"] = None
    job = Job(config, ranks=1)
    job.wait_until(lambda: job.steps_done() >= 1, "a step")
    job.kill()
    assert not job.run.complete_checkpoints(), "the kill came too late"
    shutil.copytree(tiny_data / "python", data / "python")
    run = complete(config, ranks=1)
    first, second = run.mixtures()
    assert first.weights == {"json": 0.5, "prose": 0.5}
    assert second.changed
    assert second.weights["python"] == 0
    assert run.summary().domain_tokens["python"] == 0
    assert set(run.summary().final_loss) == {"json", "prose", "python"}
