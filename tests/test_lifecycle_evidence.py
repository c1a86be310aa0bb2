"""benchmarks/lifecycle: what it would run, and the page that it writes of what has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.lifecycle import lives, methods, results
from benchmarks.lifecycle.__main__ import main
from opmix_dist.config import RunConfig
from opmix_dist.exchange import files
from opmix_dist.lifecycle.config import Stage, resolve
from opmix_dist.settings import to_yaml
from tests.conftest import DOMAINS
from tests.report.runs import STAGE_NAMES, write_lifecycle
from tests.train.jobs import tiny_config

STEPS = (10, 6, 4)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Path:
    """Three stages in which a domain joins each, the later ones with a replay store and kept moments."""
    run = tiny_config(tiny_data, tmp_path)
    shared = {name: run[name] for name in ("model", "optimizer", "search")}
    shared |= {"data": {"root": str(tiny_data)}, "train": {"global_batch_size": 8, "micro_batch_size": 2}}
    later = {
        "start": {"optimizer": "keep"},
        "data": {"replay_samples": 40},
        "schedule": {"warmup_steps": 2, "warmup_from": 0.5},
        "search": {"start_fraction": 0.0},
        "mixture": {"initial": {"old": 0.5, "new": 0.5}},
    }
    stages: list[dict[str, Any]] = [
        {"name": "a", "joins": [DOMAINS[0]], "train": {"steps": 10}, "schedule": {"decay_fraction": 0.0}},
        {"name": "b", "joins": [DOMAINS[1]], "tokens": 6 * 8 * 64, **later},
        {"name": "c", "joins": [DOMAINS[2]], "train": {"steps": 4}, **later},
    ]
    path = tmp_path / "life.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "unused", "all": shared, "stages": stages}))
    return path


def stages(config: Path, name: str, runs: Path, seed: int = 3) -> list[RunConfig]:
    life = lives.life(yaml.safe_load(config.read_text()), STEPS, runs, name, methods.METHODS[name], seed)
    return [stage.config for stage in resolve(lives.checked(life))]


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_valid_lifecycle(config: Path, tmp_path: Path, name: str) -> None:
    found = stages(config, name, tmp_path)
    assert [one.data.domains for one in found] == [list(DOMAINS[: i + 1]) for i in range(3)]
    assert {one.seed for one in found} == {3}
    assert found[1].run_dir == str(tmp_path / name / "seed3" / "stages" / "b")
    assert (found[0].mixture.policy == "opmix") == name.startswith("opmix")


def test_methods_are_what_they_say(config: Path, tmp_path: Path) -> None:
    assert stages(config, "opmix", tmp_path)[1].mixture.initial == {"old": 0.5, "new": 0.5}
    norm = [one.search.candidates.interpolation for one in stages(config, "opmix_norm", tmp_path)]
    assert norm == 3 * ["norm"]
    assert [one.mixture.initial for one in stages(config, "naive", tmp_path)] == [
        "uniform",
        *2 * [{"new": 1.0}],
    ]
    assert stages(config, "replay", tmp_path)[2].mixture.initial == {"old": 0.1, "new": 0.9}
    assert [one.method.name for one in stages(config, "ewc", tmp_path)] == ["plain", "ewc", "ewc"]
    assert [one.method.name for one in stages(config, "sdft", tmp_path)] == ["plain", "plain", "sdft"]
    teacher = stages(config, "distill", tmp_path)[2].method.distill.teacher
    assert teacher == str(tmp_path / "naive" / "seed3" / "stages" / "c" / "export" / "hf")
    assert list(methods.chosen(["distill"])) == ["naive", "distill"], "a teacher is run before"


def test_retraining_begins_anew_with_all_budgets(config: Path, tmp_path: Path) -> None:
    found = stages(config, "retrain", tmp_path)
    assert [one.train.steps for one in found] == [10, 16, 20]
    for one in found:
        assert one.start.run is None
        assert one.start.optimizer == "fresh"
        assert one.model.config is not None
        assert one.data.replay_samples is None
        assert (one.schedule.warmup_from, one.schedule.decay_fraction) == (0.0, 0.2)


def test_the_dry_run_shows_all_settings(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--methods", "naive", "retrain", "--seeds", "0", "1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("# stage c") == 4
    assert "### retrain, seed 1: from scratch at each stage" in shown
    assert "steps: 20" in shown
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--methods", "magic"]) == 2
    assert "there is no magic" in capsys.readouterr().err


def test_the_page_of_what_has_ended(tmp_path: Path) -> None:
    """Retraining trains 6 + 6 + 6 T, naive 3 + 3 + 3 T."""
    stage_list = [{"name": name, "joins": [f"d{i}"]} for i, name in enumerate(STAGE_NAMES)]
    found = []
    for name, shift, flops in (("retrain", -1.0, 6e12), ("naive", 0.0, 3e12), ("distill", -0.5, 3e12)):
        for seed in range(2):
            folder = write_lifecycle(
                tmp_path / name / f"seed{seed}", seed=seed, shift=shift + 0.1 * seed, flops=flops
            )
            method = methods.METHODS[name]
            found.append(lives.Life(name, method, seed, folder, {"stages": stage_list}))
    assert all(life.has_ended for life in found)
    compared = results.compare(found)
    text = results.markdown(compared, found, "command")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    # averages (3.75 + 2.25 + 4) / 3 - 1 and 0.1 more with the other seed; forgetting (0.75 + 0.25) / 2 - 1
    assert ["retrain", "2", "2.3833 ± 0.0707", "2.0500 ± 0.0707"] in [row[:4] for row in rows]
    assert ["naive", "+1.0000 [+1.0000, +1.0000]"] in [row[:2] for row in rows]
    assert (
        "naive: 50.0% less compute than retrain, in FLOPs: 9 T (train 9 T) against 18 T (train 18 T)" in text
    )
    assert "midtrain | 3.5000 (+0.5000) | 2.0000 joins | 7.0000 |" in text
    assert (
        "- distill with its teacher: 33.3% less compute than retrain, in FLOPs: 12 T "
        "(train 9 T + last stage of naive, its teacher, 3 T) against 18 T (train 18 T)\n" in text
    )
    json.dumps(results.as_json(compared), allow_nan=False)


def test_tasks_are_scored_from_the_stage_before_they_join(tmp_path: Path) -> None:
    folder = write_lifecycle(tmp_path / "life")
    stage_list = [{"name": name, "joins": [f"d{i}"]} for i, name in enumerate(STAGE_NAMES)]
    life = lives.Life("naive", methods.METHODS["naive"], 0, folder, {"stages": stage_list})
    scored = lives._scored_stages(life, [tmp_path / "d2"])
    assert [stage.name for stage in scored] == ["midtrain", "instruct"]
    assert lives._scored_stages(life, []) == []
    for stage in scored:
        files.write_json(stage / "scores.json", {"model": "m", "rows": []})
    assert lives.run(life, [life], [tmp_path / "d2"], 10)  # nothing is left to do, and nothing is started
    assert not folder.with_suffix(".log").exists()


def test_first_stages_that_are_the_same_are_taken_over(config: Path, tmp_path: Path) -> None:
    def resolved(name: str, seed: int = 3) -> list[Stage]:
        base = yaml.safe_load(config.read_text())
        return resolve(lives.checked(lives.life(base, STEPS, tmp_path, name, methods.METHODS[name], seed)))

    naive = resolved("naive")
    for stage in naive:
        stage.run.path.mkdir(parents=True)
        stage.run.config_file.write_text(to_yaml(stage.config))
        (stage.run.path / "weights").write_text(f"naive {stage.name}")
    for stage in naive[:2]:
        files.write_json(stage.run.summary_file, {})

    def taken(name: str, seed: int = 3) -> list[str]:
        stages = resolved(name, seed)
        lives.take_over(stages, [resolved("opmix"), naive])
        there = [stage for stage in stages if stage.run.path.exists()]
        assert all(stage.run.config() == stage.config for stage in there), "it is a run of its own folder"
        assert [(stage.run.path / "weights").read_text() for stage in there] == [
            f"naive {stage.name}" for stage in there
        ]
        return [stage.name for stage in there]

    assert taken("sdft") == ["a", "b"], "the last stage differs, and has not ended"
    assert taken("replay") == ["a"]
    assert taken("opmix") == taken("sdft", seed=4) == []
    files.write_json(naive[2].run.summary_file, {})
    assert taken("mas") == ["a"], "its second stage is another, so the third goes on from something else"
    assert taken("sdft") == ["a", "b"], "what is there stays"
