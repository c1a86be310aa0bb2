"""Mixtures that a user sets by hand: at given steps, changed by a resume, with a domain that joins then."""

from __future__ import annotations

from pathlib import Path

import pytest

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import MixtureRecord
from opmix_dist.train.policy import check_schedule
from tests.train.jobs import BATCH, LENGTH, Job, complete, tiny_config

STEPS, CHANGE = 40, 36


def static_config(schedule: dict, root: Path = Path("data"), run: Path = Path("run")) -> dict:
    config = tiny_config(
        root,
        run,
        mixture={"policy": "static", "schedule": schedule},
        checkpoint={"interval_steps": 1},
        pool={"ranks": 0},
    )
    config["data"]["domains"] = ["json", "prose"]
    config["train"]["steps"] = STEPS
    return config


def checked(schedule: dict) -> RunConfig:
    return check_config(static_config(schedule))


def record(step: int, weights: dict[str, float], why: str = "mixture.schedule") -> MixtureRecord:
    return MixtureRecord(version=step, step=step, weights=weights, why=why)


TAKEN = {
    0: record(0, {"json": 0.5, "prose": 0.5}, "initial mixture"),
    4: record(4, {"json": 1.0, "prose": 0.0}),
}


def test_coming_steps_may_change_and_past_ones_stay() -> None:
    check_schedule(checked({4: {"json": 1.0}, 9: "uniform"}), TAKEN, step=6)
    # a decision that was recorded after the checkpoint is replayed: the resumed run is where it was
    check_schedule(checked({4: {"json": 1.0}}), TAKEN, step=3)


@pytest.mark.parametrize(
    ("schedule", "step", "named"),
    [
        (
            {4: {"prose": 1.0}},
            6,
            r"schedule.4 is not what the run took there: put \{'json': 1.0\} back",
        ),
        ({4: {"prose": 1.0}}, 3, r"mixture.schedule.4 is not what the run took there"),
        ({}, 6, "mixture.schedule.4 is missing, which the run has acted on"),
        ({4: {"json": 1.0}, 5: "uniform"}, 6, "mixture.schedule.5 lies before step 6"),
    ],
)
def test_what_was_done_cannot_be_rewritten(schedule: dict, step: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_schedule(checked(schedule), TAKEN, step)


def test_a_schedule_is_the_static_policys() -> None:
    config = static_config({4: "uniform"})
    with pytest.raises(UserError, match="mixture.schedule.40 is never reached: train.steps is 40"):
        checked({40: "uniform"})
    config["mixture"]["policy"] = "opmix"
    with pytest.raises(UserError, match="mixture.schedule needs mixture.policy static, not opmix"):
        check_config(config)


@pytest.mark.launch
def test_a_run_that_its_data_stop_keeps_what_it_trained(tiny_data: Path, tmp_path: Path) -> None:
    """It ends between two checkpoints; with another cap it goes on where it stopped."""
    config = static_config({}, tiny_data, tmp_path / "run")
    config["checkpoint"] = {"interval_steps": 1000}
    samples = Catalogue.open(tiny_data).domains["json"].splits["train"].samples
    config["data"]["max_epochs"] = {"json": (7 * BATCH // 2 + 0.5) / samples}
    job = Job(config, ranks=2)
    assert job.finish() != 0
    assert "domain json is used up: max_epochs allows 28 samples" in job.log()
    assert job.run.complete_checkpoints() == [7]

    config["data"]["max_epochs"] = None
    run = complete(config, ranks=2)
    assert [line.step for line in run.train_lines()] == list(range(1, STEPS + 1))
    assert run.complete_checkpoints()[-1] == STEPS


@pytest.mark.launch
def test_a_resume_takes_new_weights_and_a_domain_that_joined(tiny_data: Path, tmp_path: Path) -> None:
    """From a checkpoint on: another mixture than was planned, with a domain that was not there before."""
    config = static_config({CHANGE: {"prose": 1.0}}, tiny_data, tmp_path / "run")
    job = Job(config, ranks=1)
    job.wait_until(lambda: len(job.run.complete_checkpoints()) > 1, "two checkpoints")
    job.kill()
    assert job.steps_done() < CHANGE, "the kill came too late"

    config["data"]["domains"] = ["prose", "python"]
    refused = Job(config, ranks=1)
    assert refused.finish() != 0
    assert "data.domains lacks json, which the run has: a domain leaves by weight 0" in refused.log()

    config["data"]["domains"] = ["json", "prose", "python"]
    config["mixture"]["schedule"] = {CHANGE: {"json": 0.5, "python": 0.5}, 38: {"python": 1.0}}
    run = complete(config, ranks=1)
    assert [(m.step, {n: w for n, w in m.weights.items() if w}) for m in run.mixtures()] == [
        (0, {"json": 0.5, "prose": 0.5}),
        (36, {"json": 0.5, "python": 0.5}),
        (38, {"python": 1.0}),
    ]
    read = {name: tokens // LENGTH for name, tokens in run.summary().domain_tokens.items()}
    assert read["prose"] == CHANGE * BATCH // 2
    assert read["json"] == CHANGE * BATCH // 2 + BATCH
    assert read["python"] == BATCH + 2 * BATCH
    assert set(run.summary().final_loss) == {"json", "prose", "python"}
