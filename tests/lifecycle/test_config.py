"""Stages of a YAML, and the runs that they are: no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opmix_dist.config import RunConfig
from opmix_dist.data.builtin_chat import RECIPES
from opmix_dist.errors import UserError
from opmix_dist.lifecycle.config import LifecycleConfig, Stage, load_lifecycle, resolve
from opmix_dist.settings import check_settings, merged_settings, to_yaml
from tests.helpers import ROOT

MODEL = {"config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2}}
STAGES: list[dict[str, Any]] = [
    {"name": "pretrain", "joins": ["python", "json"], "train": {"steps": 6}},
    {
        "name": "midtrain",
        "joins": ["prose"],
        "tokens": 1030,
        "mixture": {"initial": {"old": 0.5, "new": 0.5}},
    },
    {"name": "last", "joins": ["cpp"], "leaves": ["json"], "train": {"steps": 2, "eval_at_start": False}},
]


def lifecycle(data: Path, stages: list[dict[str, Any]] | None = None, **more: Any) -> LifecycleConfig:
    everywhere = {
        "data": {"root": str(data), "shuffle_block": 100},
        "model": MODEL,
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
        **more,
    }
    return check_settings(
        LifecycleConfig, {"run_dir": "life", "seed": 3, "all": everywhere, "stages": stages or STAGES}
    )


def by_name(stages: list[Stage]) -> dict[str, RunConfig]:
    return {stage.name: stage.config for stage in stages}


def test_domains_join_and_leave_and_all_others_are_watched(tiny_data: Path) -> None:
    found = by_name(resolve(lifecycle(tiny_data)))
    assert {name: (config.data.domains, config.data.watch) for name, config in found.items()} == {
        "pretrain": (["python", "json"], ["prose", "cpp"]),
        "midtrain": (["python", "json", "prose"], ["cpp"]),
        "last": (["python", "prose", "cpp"], ["json"]),
    }


def test_a_stage_goes_on_from_the_one_before_it(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = by_name(resolve(lifecycle(tiny_data)))
    assert [config.run_dir for config in found.values()] == [
        "life/stages/pretrain", "life/stages/midtrain", "life/stages/last",
    ]  # fmt: skip
    assert [config.start.run for config in found.values()] == [
        None, f"{tmp_path}/life/stages/pretrain", f"{tmp_path}/life/stages/midtrain",
    ], "the same wherever a launch starts"  # fmt: skip
    assert [config.model.config is None for config in found.values()] == [False, True, True]
    assert {config.seed for config in found.values()} == {3}
    assert [config.train.eval_at_start for config in found.values()] == [True, True, False]
    # 1,030 tokens at 4 samples of 64 are 4.02 steps
    assert [config.train.steps for config in found.values()] == [6, 5, 2]
    assert {config.data.shuffle_block for config in found.values()} == {100}


def test_a_fresh_stage_has_no_history(tiny_data: Path) -> None:
    again = {"name": "again", "joins": ["prose"], "fresh": True, "train": {"steps": 6}}
    config = resolve(lifecycle(tiny_data, [STAGES[0], again]))[1].config
    assert config.start.run is None
    assert config.model.config == MODEL["config"]
    assert config.data.domains == ["python", "json", "prose"]


def test_resolved_stages_load_back(tiny_data: Path) -> None:
    config = lifecycle(tiny_data)
    again = check_settings(LifecycleConfig, yaml.safe_load(to_yaml(config)))
    assert resolve(again) == resolve(config)


def test_weights_by_domain_are_one_setting() -> None:
    base = {"mixture": {"policy": "static", "initial": {"a": 0.4, "b": 0.6}}, "train": {"steps": 5}}
    over = {"mixture": {"initial": {"c": 1.0}}, "search": {"probes": {"steps": 3}}}
    assert merged_settings(RunConfig, base, over) == {
        "mixture": {"policy": "static", "initial": {"c": 1.0}},
        "train": {"steps": 5},
        "search": {"probes": {"steps": 3}},
    }


def test_overrides_reach_all_stages_or_one(tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "life.yaml"
    file.write_text(to_yaml(lifecycle(tiny_data)))
    overrides = ["--all.train.log_interval_steps", "7", "--stages.last.train.steps=9", "--run_dir", "other"]
    found = by_name(resolve(load_lifecycle(file, overrides)))
    assert {config.train.log_interval_steps for config in found.values()} == {7}
    assert [config.train.steps for config in found.values()] == [6, 5, 9]
    assert found["last"].run_dir == "other/stages/last"
    with pytest.raises(UserError, match="there is no stage `middle`"):
        load_lifecycle(file, ["--stages.middle.train.steps=9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joins": ["web"]}, "no domain 'web'"),
        ({"joins": ["json"]}, "stage midtrain: `json` joins, and is there already"),
        ({"leaves": ["cpp"]}, "stage midtrain: `cpp` cannot leave"),
        ({"joins": [], "leaves": ["python", "json"]}, "stage midtrain has no domain"),
        ({"name": "pretrain"}, "two stages are named `pretrain`"),
        ({"name": "../up"}, "stage ../up: setting `name`"),
        ({"train": {"steps": 3}}, "stage midtrain: give tokens or train.steps, not both"),
        ({"data": {"domains": ["json"]}}, "stages.midtrain.data.domains cannot be set: joins and leaves"),
        ({"start": {"run": "x"}}, "stages.midtrain.start.run cannot be set"),
        ({"model": MODEL}, "stage midtrain: model.config is for the first stage"),
        ({"trian": {}}, "stage midtrain: unknown setting `trian`"),
        ({"train": 5}, "stage midtrain: train must hold settings, not int"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(tiny_data: Path, change: dict, message: str) -> None:
    stages = [STAGES[0], {**STAGES[1], **change}, STAGES[2]]
    with pytest.raises(UserError) as error:
        resolve(lifecycle(tiny_data, stages))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_lifecycle_loads(tiny_data: Path) -> None:
    """Its chats are built-in ones, which the tests' data lack: domains of text stand for them."""
    path = ROOT / "configs" / "lifecycle-tiny.yaml"
    *_, instruct = load_lifecycle(path).stages
    assert set(instruct["joins"]) == set(RECIPES)
    data = ["--all.data.root", str(tiny_data), "--stages.instruct.joins", "[licences, stubs]"]
    for stage in resolve(load_lifecycle(path, data)):
        assert 0 <= stage.config.search_step < stage.config.train.steps
