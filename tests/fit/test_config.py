"""The settings of a fit: olmix's files as they are, ours beside them, mistakes on one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opmix_dist.errors import UserError
from opmix_dist.fit.config import FitConfig, load_fit_config
from opmix_dist.settings import check_settings, fields, to_yaml
from tests.fit.swarms import write_swarm
from tests.helpers import ROOT

TABLES = {"swarm": {"ratios": "r.csv", "metrics": "m.csv"}}

OLMIX = """
swarm:
  ratios: ratios.csv # of a published swarm
  metrics: metrics.csv

priors:
  relative_sizes: {web: 0.6, code: 0.3, math: 0.1}
  token_counts:
    web: 6_000_000_000
    code: 3_000_000_000
    math: 1_000_000_000

eval:
  type: offline
  tasks:
    text: ["web_loss"]
    hard: ["code_loss", "math_loss"]

regression:
  type: log_linear
  seed: 0
  n_test: 0
  train_split: 1.0
  aggregate_task_families: true

proposer:
  type: exact
  temperature: null
  kl_reg: 0.05
  fit_only: false
  make_worst_mix: false

constraints:
  enabled: true
  target_tokens: 20_000_000_000
  repetition_factor: 4.0

filtering:
  drop_metrics: ["wildchat_masked_ppl"]
  obj_weights: {text: "7/52.0", hard: 0.5}
"""
"""Every section and key of olmix's fit files (olmix/fit/config.py there)."""


def check(**sections: object) -> FitConfig:
    return check_settings(FitConfig, {**TABLES, **sections})


def test_the_shipped_file_has_every_setting_at_its_default() -> None:
    text = (ROOT / "configs" / "fit.yaml").read_text()
    config = check_settings(FitConfig, yaml.safe_load(text))
    assert config == check(swarm={"ratios": "ratios.csv", "metrics": "metrics.csv"})
    assert text.endswith(f".\n{to_yaml(config, documented=True)}")
    assert [key for key, field in fields(FitConfig) if not field.description] == []


def test_a_file_of_olmix_is_read_as_it_is(tmp_path: Path) -> None:
    write_swarm(tmp_path)
    (tmp_path / "fit.yaml").write_text(OLMIX)
    config = load_fit_config(tmp_path / "fit.yaml")
    assert config.swarm.ratios == str(tmp_path / "ratios.csv")
    assert config.eval.families() == {"text": ["web_loss"], "hard": ["code_loss", "math_loss"]}
    assert config.filtering.obj_weights == {"text": 7 / 52, "hard": 0.5}
    assert config.constraints.target_tokens == 20_000_000_000
    assert (config.regression.family, config.proposer.kl) == ("log_linear", 0.05)


def test_tasks_of_its_other_form_are_read() -> None:
    tasks = {"math": {"task_a": "eval/math_a (BPB)", "task_b": "eval/math_b (BPB)"}}
    config = check(eval={"type": "inloop", "tasks": tasks})
    assert config.eval.families() == {"math": ["eval/math_a (BPB)", "eval/math_b (BPB)"]}


def test_tables_lie_in_the_working_folder_or_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_swarm(tmp_path)
    (tmp_path / "fit.yaml").write_text(OLMIX)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "cwd" / "metrics.csv").write_text("nearer")
    swarm = load_fit_config(Path("../fit.yaml")).swarm
    assert (swarm.ratios, swarm.metrics) == ("../ratios.csv", "metrics.csv")
    (tmp_path / "ratios.csv").unlink()
    with pytest.raises(UserError, match=r"there is no table ratios.csv or ../ratios.csv"):
        load_fit_config(Path("../fit.yaml"))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    write_swarm(tmp_path)
    (tmp_path / "fit.yaml").write_text(OLMIX)
    config = load_fit_config(tmp_path / "fit.yaml", ["--proposer.kl_reg=0.2", "--regression.type=gp"])
    assert (config.proposer.kl, config.regression.family) == (0.2, "gaussian_process")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("lightgbm", "trees"), ("gp", "gaussian_process"), ("bimix", "power"), ("auto", "auto")],
)
def test_types_of_regression_are_families(theirs: str, ours: str) -> None:
    assert check(regression={"type": theirs}).regression.family == ours


def test_a_simulation_has_no_divergence_unless_it_is_asked_for() -> None:
    assert check(proposer={"type": "simulation"}).proposer.kl == 0
    assert check(proposer={"type": "simulation", "kl_reg": 0.1}).proposer.kl == 0.1
    assert check(proposer={"type": "exact", "kl_reg": None}).proposer.kl == 0.05


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"proposer": {"klreg": 1}},
            "unknown setting `proposer.klreg`: the nearest valid one is `proposer.kl_reg`",
        ),
        ({"eval": {"task": {}}}, "unknown setting `eval.task`: the nearest valid one is `eval.tasks`"),
        ({"regresion": {}}, "unknown setting `regresion`: the nearest valid one is `regression`"),
        ({"regression": {"type": "autoscale"}}, "`regression.type`: olmix's autoscale is no law of mixtures"),
        ({"regression": {"type": "search"}}, "`regression.type`: olmix's search is no law of mixtures"),
        (
            {"regression": {"type": "linear"}},
            "`linear` is no type of regression: take one of log_linear, lightgbm",
        ),
        ({"proposer": {"type": "search"}}, "`proposer.type`: olmix's search takes the best of the runs"),
        ({"constraints": {"enabled": True}}, "constraints.enabled needs constraints.target_tokens"),
        (
            {"constraints": {"enabled": True, "target_tokens": 1}},
            "constraints.enabled needs priors.token_counts",
        ),
        (
            {"eval": {"tasks": {"f": {"a": "b"}}}},
            "eval.tasks.f must be a list of metrics, as eval.type is offline",
        ),
        ({"eval": {"type": "inloop", "tasks": {"f": ["a"]}}}, "eval.tasks.f must be a map from tasks"),
        ({"eval": {"tasks": {"f": []}}}, "eval.tasks.f has no task"),
        ({"filtering": {"obj_weights": {"a": "1/0"}}}, "`1/0` is no fraction of two numbers"),
        ({"filtering": {"obj_weights": {"a": -1}}}, "filtering.obj_weights.*greater than or equal to 0"),
        (
            {"objective": {"type": "relative"}},
            "objective.type compares with the current model: give its mixture",
        ),
        ({"objective": {"max_increase": 0.1}}, "objective.max_increase compares with the current model"),
        ({"bootstrap": {"count": 1}}, "bootstrap.count must be 0, for no intervals, or at least 2"),
        (
            {"proposer": {"make_worst_mix": True}, "objective": {"type": "worst"}},
            "make_worst_mix goes with objective.type mean",
        ),
    ],
)
def test_mistakes_are_named_on_one_line(sections: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(**sections)
    assert "\n" not in str(caught.value)
