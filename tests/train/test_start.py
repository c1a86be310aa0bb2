"""A run that goes on from an ended one: both in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.errors import UserError
from opmix_dist.exchange.history import history_of, open_domains, tokens_read
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.faults import points
from opmix_dist.faults.injector import InjectedError
from opmix_dist.seeds import derive_seed
from opmix_dist.train.roles import run_job
from tests.train.jobs import BATCH, LENGTH, curve, schedule, tiny_config

STEP_TOKENS = BATCH * LENGTH
SEARCH = {
    "start_fraction": 0.0,
    "probes": {"steps": 3, "batch_size": 1, "rank": 2},
    "candidates": {"count": 5, "samples_per_domain": 2},
    "refinement": {"rounds": 0},
    "proposal": {"no_move": False, "bootstrap": 0},
}


class Stages:
    """Runs of which each goes on from the one before it."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder

    def config(self, name: str, domains: list[str], after: str | None = None, **sections: Any) -> RunConfig:
        of_data = sections.pop("data", {})
        given = tiny_config(self.data, self.folder / name, pool={"ranks": 0}, **sections)
        given["data"] |= {"domains": domains, **of_data}
        given["train"] |= {"eval_interval_steps": 0, **sections.get("train", {})}
        if after is not None:
            given["model"] = {}
            given["start"] = {"run": str(self.folder / after), **sections.get("start", {})}
        return check_config(given)

    def run(self, name: str, domains: list[str], after: str | None = None, **sections: Any) -> RunDir:
        run_job(self.config(name, domains, after, **sections))
        return RunDir(self.folder / name)


@pytest.fixture(scope="module")
def stages(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """With a first run of 4 steps on three quarters of json and a quarter of prose."""
    made = Stages(tiny_data, tmp_path_factory.mktemp("stages"))
    made.run(
        "first",
        ["json", "prose"],
        train={"steps": 4},
        mixture={"policy": "static", "initial": {"json": 0.75, "prose": 0.25}},
        schedule={"decay_fraction": 0.0},
    )
    return made


STATIC = {"policy": "static", "initial": {"old": 0.5, "new": 0.5}}


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return {name: w for file in run.export.glob("*.safetensors") for name, w in load_file(file).items()}


def test_history_adds_up_over_runs(stages: Stages) -> None:
    assert tokens_read(RunDir(stages.folder / "first")) == {"json": 3 * STEP_TOKENS, "prose": STEP_TOKENS}
    second = stages.run(
        "second",
        ["json", "prose", "python"],
        "first",
        train={"steps": 2, "eval_at_start": True},
        mixture=STATIC,
        data={"watch": ["cpp"]},
    )
    summary = second.summary()
    assert summary.history == {"json": 3 * STEP_TOKENS, "prose": STEP_TOKENS}
    assert summary.domain_tokens == {
        "json": 0.375 * 2 * STEP_TOKENS, "prose": 0.125 * 2 * STEP_TOKENS, "python": STEP_TOKENS,
    }  # fmt: skip
    third = stages.config("third", ["python", "cpp"], "second")
    assert history_of(third) == {
        "json": 3.75 * STEP_TOKENS, "prose": 1.25 * STEP_TOKENS, "python": STEP_TOKENS,
    }  # fmt: skip
    # what is watched is evaluated like the rest, and on the same samples as in the run before
    lines = second.eval_lines()
    assert [line.step for line in lines] == [0, 2]
    first = RunDir(stages.folder / "first").summary()
    for line in lines:
        assert set(line.loss) == {"json", "prose", "python", "cpp"}
    assert lines[0].loss["json"] == pytest.approx(first.final_loss["json"], abs=1e-6)
    assert summary.final_loss == lines[1].loss
    assert set(summary.final_search_loss) == {"json", "prose", "python"}


def test_weights_and_moments_go_on(stages: Stages) -> None:
    """Of a step at a rate of nearly nothing, so that the weights stay: kept moments make another gradient's
    step than fresh ones, which would step by the rate itself."""
    first = RunDir(stages.folder / "first")
    moved = {}
    for kind in ("fresh", "keep"):
        run = stages.run(
            kind,
            ["json", "prose"],
            "first",
            train={"steps": 1},
            optimizer={"lr": 1e-3, "weight_decay": 0.0},
            mixture={"policy": "static", "initial": "old"},
            schedule={"name": "constant"},
            start={"optimizer": kind},
        )
        before, after = weights(first), weights(run)
        name = "model.layers.0.mlp.up_proj.weight"
        moved[kind] = (after[name] - before[name]).abs()
    # AdamW's first step is the rate in each entry with a gradient, whatever its size
    assert moved["fresh"].median() == pytest.approx(1e-3, rel=1e-2)
    assert moved["keep"].median() < 0.9e-3


def test_moments_that_are_gone_are_missed_by_name(stages: Stages, tmp_path: Path) -> None:
    shutil.copytree(stages.folder / "first", tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    alone = Stages(stages.data, tmp_path)
    with pytest.raises(UserError, match="start.optimizer keep needs the checkpoint of step 4"):
        alone.run("keep", ["json"], "first", mixture=STATIC | {"initial": "old"}, start={"optimizer": "keep"})


def test_a_search_before_the_first_step_and_its_resume(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped behind the search, before its mixture was recorded; again, before a checkpoint was written."""

    def settings(**more: Any) -> dict[str, Any]:
        return {
            "train": {"steps": 3}, "mixture": {"initial": {"old": 0.4, "new": 0.6}},
            "search": SEARCH, "checkpoint": {"interval_steps": 0}, **more,
        }  # fmt: skip

    domains = ["json", "prose", "python", "cpp"]
    whole = stages.run("whole", domains, "first", **settings())
    request = whole.search("0001").request()
    assert request.step == 0
    assert request.new_domains == ["python", "cpp"]
    np.testing.assert_allclose(request.composition[0], [0.75, 0.25, 0, 0])
    proposal = whole.search("0001").proposal()
    assert [(r.version, r.step, r.search) for r in whole.mixtures()] == [(1, 0, "0001")]
    assert whole.mixtures()[0].weights == pytest.approx(proposal.weights)
    assert {line.mixture_version for line in whole.train_lines()} == {1}

    for point, step in (("mixture.record", 0), ("train.step", 2)):
        fault = {"id": point, "point": point, "kind": "exception", "step": step}
        plan = tmp_path / f"{point}.json"
        plan.write_text(json.dumps({"fired": str(tmp_path / "fired"), "faults": [fault]}))
        monkeypatch.setenv(points.PLAN_VARIABLE, str(plan))
        monkeypatch.setattr(points, "_injector", None)
        with pytest.raises(InjectedError, match=point):
            stages.run("broken", domains, "first", **settings())
    monkeypatch.delenv(points.PLAN_VARIABLE)
    monkeypatch.setattr(points, "_injector", None)
    resumed = stages.run("broken", domains, "first", **settings())
    assert curve(resumed) == curve(whole)
    assert schedule(resumed) == schedule(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_part_that_is_kept_is_the_same_in_all_stages(stages: Stages) -> None:
    config = stages.config("replay", ["json", "python"], "first", data={"replay_samples": 6})
    catalogue = open_domains(config)
    assert catalogue.samples("train").tolist()[0] == 6
    assert catalogue.samples("train")[1] > 6

    def read(catalogue: Catalogue, seed: int) -> set[bytes]:
        loader = MixtureLoader(
            catalogue,
            {"json": 1.0},
            global_batch_size=12,
            rank=0,
            world_size=1,
            seed=derive_seed(seed, "data"),
        )
        return {row.numpy().tobytes() for row in next(loader).batch.tokens}

    assert read(catalogue, 0) == read(catalogue, 1)
    assert len(read(catalogue, 0)) <= 6
    by_name = stages.config("replay", ["json", "python"], "first", data={"replay_samples": {"python": 5}})
    assert open_domains(by_name).samples("train").tolist()[1] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(start={"run": "x"}), "start.run gives the weights: leave out model.checkpoint"),
        (lambda c: c.update(model={}), "give exactly one of model.checkpoint and model.config, or start.run"),
        (lambda c: c.update(start={"optimizer": "keep"}), "start.optimizer keep needs a start.run"),
        (lambda c: c["search"].update(start_fraction=0), "search.start_fraction 0 needs a start.run"),
        (lambda c: c["data"].update(replay_samples=5), "data.replay_samples needs a start.run"),
    ],
)
def test_settings_that_need_a_start(change: Callable[[dict], None], message: str) -> None:
    given = tiny_config(Path("data"), Path("run"))
    change(given)
    with pytest.raises(UserError) as error:
        check_config(given)
    assert message in str(error.value)


def test_a_run_that_has_not_ended_is_no_start(stages: Stages) -> None:
    with pytest.raises(UserError, match="start.run .*nowhere has not ended"):
        stages.run("late", ["json"], "nowhere", mixture={"policy": "static"})


def test_what_is_trained_on_is_not_watched(stages: Stages) -> None:
    with pytest.raises(UserError, match="data.watch names json, which is trained on"):
        stages.run("watch", ["json"], "first", data={"watch": ["json"]}, mixture={"policy": "static"})
