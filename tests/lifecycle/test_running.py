"""Whole lifecycles: killed between and within stages, and stopped on request."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from opmix_dist.cli import main
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import Summary
from opmix_dist.lifecycle.config import LifecycleConfig, load_lifecycle, resolve
from opmix_dist.lifecycle.running import chosen_stages, require_same_stages
from opmix_dist.settings import check_settings
from opmix_dist.train.roles import run_job
from tests.launch.test_stopping import Command, written
from tests.launch.test_stopping import ended as has_died
from tests.lifecycle.test_config import lifecycle
from tests.train.jobs import Job, curve, schedule, tiny_config

STAGES: list[dict[str, Any]] = [
    {"name": "pretrain", "joins": ["json", "prose"], "train": {"steps": 6}, "mixture": {"policy": "static"}},
    {
        "name": "midtrain", "joins": ["python", "cpp"], "train": {"steps": 7}, "start": {"optimizer": "keep"},
        "mixture": {"initial": {"old": 0.5, "new": 0.5}}, "data": {"replay_samples": 30},
        "search": {"start_fraction": 0.3},
    },
]  # fmt: skip


def whole_config(data: Path, folder: Path, **pool: int) -> dict[str, Any]:
    """With a search in the second stage."""
    everywhere = tiny_config(data, folder, pool=pool)
    del everywhere["run_dir"], everywhere["data"]["domains"]
    everywhere["search"] |= {
        "probes": {"steps": 3, "batch_size": 1, "rank": 2},
        "candidates": {"count": 5, "samples_per_domain": 2},
    }
    everywhere["checkpoint"] = {"interval_steps": 2}
    return {"run_dir": str(folder), "seed": 3, "all": everywhere, "stages": STAGES}


@pytest.mark.launch
def test_a_lifecycle_that_is_stopped_and_killed_ends_as_its_stages_one_by_one(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trainer and a pool rank, launched and stopped in the first stage, resumed and killed in the second
    one's search, and gone on with by hand; against runs of the same settings, alone and without a pool rank,
    in this process."""
    config = whole_config(tiny_data, tmp_path / "broken", ranks=1)
    life = RunDir(tmp_path / "broken")
    first, second = (RunDir(life.path / "stages" / str(one["name"])) for one in STAGES)

    def status() -> dict[str, Any]:
        main(["status", str(life.path), "--json"])
        return dict(json.loads(capsys.readouterr().out))

    launched = Command(life, "launch", "local", written(config), "--ranks", "2")
    launched.wait_for(lambda: len(first.train_lines()) >= 3, "step 3 of the first stage")
    assert main(["cancel", str(life.path)]) == 0
    assert "saves and stops" in capsys.readouterr().out
    assert launched.finish() == 128 + signal.SIGTERM, launched.said()
    assert first.stopped() is not None
    assert not second.path.exists()
    told = status()
    assert (told["stages"], told["stopped"]) == ({"pretrain": "begun", "midtrain": "waiting"}, True)

    resumed = Command(life, "resume", str(life.path))
    resumed.wait_for(lambda: second.search("0001").request_file.exists(), "the search of the second stage")
    told = status()
    assert (told["stages"], told["stage"]) == ({"pretrain": "ended", "midtrain": "begun"}, "midtrain")
    assert (told["active"], told["stopped"]) == (True, False)
    below = resumed.below("opmix_dist")
    assert len([process for process in below if "opmix_dist.lifecycle.stage" in process.cmdline()]) == 2
    assert main(["cancel", str(life.path), "--now"]) == 0
    assert resumed.finish() == 128 + signal.SIGKILL, resumed.said()
    assert all(has_died(process) for process in below)
    assert not second.summary_file.exists()
    by_hand = Job(config, 2, command="lifecycle")
    assert by_hand.finish() == 0, by_hand.log()
    assert "stage 1 of 2, pretrain: has ended" in by_hand.log()

    settings = check_settings(LifecycleConfig, whole_config(tiny_data, tmp_path / "whole", ranks=0))
    for stage in resolve(settings):
        run_job(stage.config)
        ours = RunDir(life.path / "stages" / stage.name)
        assert curve(ours) == curve(stage.run)
        assert schedule(ours) == schedule(stage.run)
        assert ours.summary().history == stage.run.summary().history
        for file in stage.run.export.glob("*.safetensors"):
            expected, found = load_file(file), load_file(ours.export / file.name)
            assert all(found[key].equal(expected[key]) for key in expected)
    assert [line.step for line in second.eval_lines()] == [0, 7]
    saved = yaml.safe_load((life.path / "lifecycle.yaml").read_text())
    assert [stage["name"] for stage in saved["stages"]] == ["pretrain", "midtrain"]


def ended(config: LifecycleConfig, names: list[str]) -> None:
    """Leave what ended stages would."""
    for stage in resolve(config):
        if stage.name in names:
            stage.run.write_config(stage.config)
            empty: dict[str, Any] = {"domain_tokens": {}, "final_loss": {}, "final_stderr": {}, "costs": {}}
            empty |= {"final_search_loss": {}, "mixture": {}, "versions": {}}
            summary = Summary(steps=1, tokens=1, parameters=1, world_size=1, **empty)
            write_record(stage.run.summary_file, summary)


def test_which_stages_are_gone_through(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = lifecycle(tiny_data)
    stages = resolve(config)
    assert chosen_stages(stages, only=None, first=None) == stages
    ended(config, ["pretrain"])
    assert chosen_stages(stages, only="midtrain", first=None) == stages[1:2]
    assert chosen_stages(stages, only=None, first="midtrain") == stages[1:]
    with pytest.raises(UserError, match="stage last goes on from midtrain, which has not ended"):
        chosen_stages(stages, only="last", first=None)
    with pytest.raises(
        UserError, match="there is no stage `middle`: the lifecycle has pretrain, midtrain, last"
    ):
        chosen_stages(stages, only=None, first="middle")


def test_a_stage_that_has_ended_keeps_its_settings(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = lifecycle(tiny_data)
    ended(config, ["pretrain"])
    require_same_stages(resolve(config))
    file = tmp_path / "life.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    require_same_stages(resolve(load_lifecycle(file, ["--stages.last.optimizer.lr=0.5"])))
    require_same_stages(resolve(load_lifecycle(file, ["--all.checkpoint.keep=5"])))
    changed = resolve(load_lifecycle(file, ["--all.optimizer.lr=0.5"]))
    with pytest.raises(UserError, match=r"stage pretrain has ended with other settings \(optimizer.lr\)"):
        require_same_stages(changed)
