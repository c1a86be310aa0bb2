"""Bad steps by policy, in this process: jobs of one rank whose faults are planned."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from opmix_dist.config import check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.faults import points
from opmix_dist.faults.injector import InjectedError
from opmix_dist.ledger import LEFT_OUT
from opmix_dist.train.roles import run_job
from tests.conftest import DOMAINS
from tests.train.jobs import BATCH, LENGTH, STEPS, curve, tiny_config


class Case:
    """A run without a search, and its faults."""

    def __init__(self, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> None:
        self.folder, self.run = folder, RunDir(folder / "run")
        self.config = tiny_config(
            data,
            self.run.path,
            pool={"ranks": 0},
            mixture={"policy": "static", "schedule": {7: {"json": 0.6, "prose": 0.2, "python": 0.2}}},
            checkpoint={"interval_steps": 3},
            train={"eval_interval_steps": 0, **train},
        )
        folder.mkdir()
        self.monkeypatch = monkeypatch

    def plan(self, *faults: dict[str, Any]) -> None:
        plan = {"fired": str(self.folder / "fired"), "faults": list(faults)}
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def start(self, **train: Any) -> None:
        self.monkeypatch.setenv(points.PLAN_VARIABLE, str(self.folder / "plan.json"))
        self.monkeypatch.setattr(points, "_injector", None)
        self.config["train"] |= train
        run_job(check_config(self.config))

    @property
    def fired(self) -> set[str]:
        return {mark.stem for mark in (self.folder / "fired").glob("*.json")}

    def batches_read(self) -> float:
        return self.run.summary().tokens / (BATCH * LENGTH)


def nan(at: int, name: str = "nan") -> dict[str, Any]:
    return {"id": name, "point": "train.gradient", "kind": "nan", "step": at}


def error(point: str, at: int) -> dict[str, Any]:
    return {"id": "error", "point": point, "kind": "exception", "step": at}


def test_a_bad_batch_is_left_out_and_a_resume_leaves_it_out_though_it_is_good_now(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Case(tiny_data, tmp_path / "whole", monkeypatch, on_bad_step="skip")
    whole.plan(nan(5))
    whole.start()
    (met,) = whole.run.bad_steps()
    assert (met.kind, met.action, met.step, met.batch) == ("nan", "skip", 5, 5)
    assert set(met.domain_loss) <= set(DOMAINS)
    assert all(loss > 1 for loss in met.domain_loss.values())
    assert [line.step for line in whole.run.train_lines()] == list(range(1, STEPS + 1))
    assert whole.batches_read() == STEPS + 1
    costs = whole.run.summary().costs
    assert costs[LEFT_OUT].tokens == BATCH * LENGTH
    assert costs["train"].tokens == STEPS * BATCH * LENGTH
    assert costs[LEFT_OUT].flops == pytest.approx(costs["train"].flops / STEPS), "it was computed"
    assert costs[LEFT_OUT].seconds > 0

    again = Case(tiny_data, tmp_path / "again", monkeypatch, on_bad_step="skip")
    again.config["checkpoint"]["interval_steps"] = 0  # from the very beginning
    again.plan(nan(5), error("train.step", 8))
    with pytest.raises(InjectedError):
        again.start()
    again.start()
    assert again.fired == {"nan", "error"}
    assert len(again.run.bad_steps()) == 1
    assert curve(again.run) == curve(whole.run)
    assert again.run.summary().domain_tokens == whole.run.summary().domain_tokens
    costs = again.run.summary().costs
    assert (costs[LEFT_OUT].tokens, costs[LEFT_OUT].flops) == (BATCH * LENGTH, 0), "it was only read"

    good = Case(tiny_data, tmp_path / "good", monkeypatch)
    good.plan()
    good.start()
    assert curve(good.run)[:5] == curve(whole.run)[:5]
    assert curve(good.run)[5] != curve(whole.run)[5], "another batch"


def test_a_rollback_goes_on_behind_the_bad_batch_and_a_resume_follows_it(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 8 to the checkpoint of step 6, over a change of the mixture at step 7."""
    whole = Case(tiny_data, tmp_path / "whole", monkeypatch, on_bad_step="rollback")
    whole.plan(nan(8))
    whole.start()
    (met,) = whole.run.bad_steps()
    assert (met.action, met.step, met.batch, met.checkpoint) == ("rollback", 8, 8, 6)
    assert sum(met.domain_tokens.values()) == 9 * BATCH * LENGTH, "with the bad batch"
    assert whole.batches_read() == STEPS + 3, "batches 6, 7 and 8 are left out"
    costs = whole.run.summary().costs
    assert costs[LEFT_OUT].tokens == 3 * BATCH * LENGTH
    assert costs["train"].tokens == STEPS * BATCH * LENGTH
    assert costs[LEFT_OUT].flops == pytest.approx(costs["train"].flops * 3 / STEPS)

    again = Case(tiny_data, tmp_path / "again", monkeypatch, on_bad_step="rollback")
    again.plan(nan(8), error("checkpoint.begin", 9))
    with pytest.raises(InjectedError):
        again.start()
    assert again.run.complete_checkpoints() == [3, 6], "the resume starts where the rollback did"
    again.start()
    assert again.fired == {"nan", "error"}
    assert len(again.run.bad_steps()) == 1
    assert curve(again.run) == curve(whole.run)
    assert again.run.summary().domain_tokens == whole.run.summary().domain_tokens


def test_a_bad_step_stops_a_run_by_default_and_too_many_in_a_row_do(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tiny_data, tmp_path / "run", monkeypatch)
    case.plan(nan(4), *(nan(7, f"nan{i}") for i in range(3)), nan(10, "last"))
    with pytest.raises(
        UserError, match=r"step 4: the gradient norm is nan.*goes on from step 3.*on_bad_step"
    ):
        case.start()
    with pytest.raises(
        UserError, match=r"step 7: .*2 batches before it were left out \(train.max_bad_steps\)"
    ):
        case.start(on_bad_step="skip", max_bad_steps=2)
    case.config["checkpoint"]["keep"] = 100
    with pytest.raises(UserError, match=r"step 10: .*goes on from step 9"):
        case.start(on_bad_step="stop")
    case.start()
    assert [(met.action, met.step, met.batch) for met in case.run.bad_steps()] == [
        ("stop", 4, 4),
        ("skip", 7, 7),
        ("skip", 7, 8),
        ("stop", 7, 9),
        ("stop", 10, 12),
    ]
    assert case.batches_read() == STEPS + 2


def test_without_a_checkpoint_a_rollback_stops(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tiny_data, tmp_path / "run", monkeypatch, on_bad_step="rollback", max_bad_steps=1)
    case.plan(nan(2, "first"), nan(4, "second"), nan(5, "third"))
    with pytest.raises(UserError, match="no checkpoint to go back to.*goes on from the beginning"):
        case.start()
    with pytest.raises(UserError, match=r"step 5: .*went back to step 3 1 times \(train.max_bad_steps\)"):
        case.start()


@pytest.mark.parametrize(
    ("setting", "kind", "number", "digits"),
    [
        ("spike_deviations", "spike", "loss", ".4f"),
        ("grad_norm_deviations", "gradient spike", "grad_norm", ".4g"),
    ],
)
def test_a_number_above_the_window_is_a_spike(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    kind: str,
    number: str,
    digits: str,
) -> None:
    """With a threshold so low that ordinary batches exceed it; the limits are computed by hand."""
    settings = {setting: 0.01, "spike_window": 3, "on_bad_step": "skip", "max_bad_steps": 100}
    case = Case(tiny_data, tmp_path / "run", monkeypatch, **settings)
    case.config["optimizer"]["lr"] = 1e-5  # so that the loss does not fall out of the window
    case.plan(error("train.step", 12))
    with pytest.raises(InjectedError):
        case.start()
    case.start()
    met = case.run.bad_steps()
    assert {one.kind for one in met} == {kind}
    numbers = [getattr(line, number) for line in case.run.train_lines()]
    for one in met:
        seen = numbers[one.step - 3 : one.step]
        limit = statistics.fmean(seen) + 0.01 * statistics.pstdev(seen)
        assert f"above the limit of {limit:{digits}}" in one.reason
        assert one.step not in (0, 1, 2, 7, 8, 9), "the window is not full there"
    for step in (3, 4, 5, 6, 10, 11, 12, 13, 14, 15):
        seen = numbers[step - 3 : step]
        assert numbers[step] <= statistics.fmean(seen) + 0.01 * statistics.pstdev(seen)
    assert case.batches_read() == STEPS + len(met)
